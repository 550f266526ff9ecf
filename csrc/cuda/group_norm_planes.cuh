// GroupNorm where channels are planes.  A block takes a group of a sample, in pieces of its planes; a piece is what some
// lanes of a warp hold in registers.  If the block's warps hold the whole group so, device memory is read once;
// otherwise they go through it twice, the second time from its end backwards, through what the caches still hold.
#pragma once

#include <cstdint>

#include "group_norm_call.cuh"

namespace rk::cuda {

constexpr int kPieceVectors = 4;    // of a lane
constexpr int kHeldThreads = 256;   // at most, of a block that holds its group
constexpr int kPlaneThreads = 512;  // of one that does not: one on a multiprocessor, so that the caches hold all groups

template <bool kHeld, bool kSecond, class S, class W>
__global__ void __launch_bounds__(kHeld ? kHeldThreads : kPlaneThreads, kHeld ? 2 : 1)
    group_norm_planes_kernel(const GroupNormCall<S> c) {
  using A = accumulation_t<S>;
  constexpr int V = W::kSize;
  __shared__ A held[kHeld ? kHeldThreads / 32 : 1][3];
  const int lane = threadIdx.x % c.lanes, first_piece = threadIdx.x / c.lanes, step = c.threads / c.lanes;
  TeamSums<A, GroupSums<kSecond, A>::kCount> team(c.threads);
  const std::int64_t units = c.samples * c.groups;
  for (std::int64_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const std::int64_t group = unit - c.by_groups.quotient(unit) * c.groups;
    const A mean = c.mean[unit], r = c.rstd[unit];
    W x[kPieceVectors], g[kPieceVectors], u[kPieceVectors];

    // Where a lane's vectors of a piece lie.
    struct Place {
      int channel, slot;    // of the group's channels, of the plane's pieces
      std::int64_t offset;  // of the first vector
      int left;             // vectors from it to the piece's end
    };
    const auto place_of = [&](int piece) {
      const int channel = static_cast<int>(c.by_slots.quotient(static_cast<unsigned>(piece))),
                slot = piece - channel * c.slots;
      const std::int64_t from = std::int64_t{slot} * c.slot_vectors, plane = c.positions / V;
      const std::int64_t rest = plane - from < c.slot_vectors ? plane - from : c.slot_vectors;
      return Place{channel, slot, ((unit * c.width + channel) * plane + from + lane) * V,
                   piece < c.pieces ? static_cast<int>(rest) - lane : 0};
    };
    const auto read = [&](W(&to)[kPieceVectors], const S* from, const Place& place) {
#pragma unroll
      for (int i = 0; i < kPieceVectors; ++i)
        to[i] = i * c.lanes < place.left ? read_vector<W>(from + place.offset + i * c.lanes * V) : W{};
    };
    const auto read_all = [&](const Place& place) {
      read(x, c.x, place);
      read(g, c.g, place);
      if (kSecond && c.u)
        read(u, c.u, place);
      else
#pragma unroll
        for (int i = 0; i < kPieceVectors; ++i) u[i] = W{};
    };
    const auto sums_of = [&] {
      Sums<kSecond, A> s;
#pragma unroll
      for (int i = 0; i < kPieceVectors; ++i)
#pragma unroll
        for (int k = 0; k < V; ++k) s.add(x[i][k] - mean, g[i][k], u[i][k]);
      return s.of_channel(r);
    };
    const auto write = [&](const Place& place, const ChannelBends<A>& d) {
#pragma unroll
      for (int i = 0; i < kPieceVectors; ++i) {
        if (i * c.lanes >= place.left) continue;
        forget(x[i]);
        forget(g[i]);
        forget(u[i]);
        A gg_grad[V], grad_x[V];
#pragma unroll
        for (int k = 0; k < V; ++k) {
          const A xh = (x[i][k] - mean) * r;
          gg_grad[k] = gg_grad_of(d, xh, u[i][k]);
          grad_x[k] = grad_x_of<kSecond>(d, xh, g[i][k], u[i][k]);
        }
        if (kSecond && c.gg_grad) write_vector<W>(c.gg_grad + place.offset + i * c.lanes * V, gg_grad);
        if (c.grad_x) write_vector<W>(c.grad_x + place.offset + i * c.lanes * V, grad_x);
      }
    };
    // The sums that gradients of parameters need, over the lanes of a piece.
    const bool sums_wanted = c.sample_weight || c.sample_bias;
    const auto over_lanes = [&](ChannelSums<A>& s) {
#pragma unroll
      for (int d = 16; d; d /= 2) {
        if (d >= c.lanes) continue;
        s.g += __shfl_xor_sync(0xffffffffu, s.g, d);
        s.gx += __shfl_xor_sync(0xffffffffu, s.gx, d);
        s.ug += __shfl_xor_sync(0xffffffffu, s.ug, d);
      }
    };
    const auto put_sums = [&](A* to, const ChannelSums<A>& s) {
      to[0] = s.g;
      to[1] = s.gx;
      to[2] = s.ug;
    };
    const std::int64_t first_channel = group * c.width;
    GroupSums<kSecond, A> s;
    const auto write_sums = [&](int channel, const ChannelSums<A>& sums, const GroupScalars<kSecond, A>& scalars) {
      if (c.sample_weight) c.sample_weight[unit * c.width + channel] = scalars.grad_weight(sums);
      if (c.sample_bias) c.sample_bias[unit * c.width + channel] = sums.g;
    };
    // Of the channels in several pieces, whose sums lie at `from`.
    const auto write_all_sums = [&](const A* from, const GroupScalars<kSecond, A>& scalars) {
      for (int channel = threadIdx.x; channel < c.width; channel += c.threads) {
        ChannelSums<A> sums{};
        for (int slot = 0; slot < c.slots; ++slot) {
          const A* const piece = from + (std::int64_t{channel} * c.slots + slot) * 3;
          sums.g += piece[0];
          sums.gx += piece[1];
          sums.ug += piece[2];
        }
        write_sums(channel, sums, scalars);
      }
    };

    if constexpr (kHeld) {
      const Place place = place_of(first_piece);
      const bool there = first_piece < c.pieces;
      const std::int64_t channel = first_channel + place.channel;
      read_all(place);
      const A weight = there ? c.weight_at(channel) : A(0), a = kSecond && there ? c.a_at(channel) : A(0);
      ChannelSums<A> own = sums_of();
      s.add(own, weight, a);
      if (sums_wanted) {
        over_lanes(own);
        // Several slots are several warps, so that adding up has a barrier.
        if (c.slots > 1 && there && lane == 0) put_sums(held[first_piece], own);
      }
      team.add_up(s.sums);
      const GroupScalars<kSecond, A> scalars(s, r, c.average);
      if (there) write(place, scalars.of_channel(weight, a, kSecond ? c.b_at(channel) : A(0)));
      if (sums_wanted && c.slots == 1 && there && lane == 0) write_sums(place.channel, own, scalars);
      if (sums_wanted && c.slots > 1) {
        write_all_sums(held[0], scalars);
        __syncthreads();  // they are written again
      }
    } else {
      A* const sums = c.scratch + unit * c.pieces * 3;
      for (int piece = first_piece; piece - first_piece < c.pieces; piece += step) {
        const Place place = place_of(piece);
        const bool there = piece < c.pieces;
        const std::int64_t channel = first_channel + place.channel;
        read_all(place);
        ChannelSums<A> own = sums_of();
        if (there) s.add(own, c.weight_at(channel), kSecond ? c.a_at(channel) : A(0));
        if (!sums_wanted) continue;
        over_lanes(own);
        if (there && lane == 0) put_sums(sums + piece * std::int64_t{3}, own);
      }
      team.add_up(s.sums);
      const GroupScalars<kSecond, A> scalars(s, r, c.average);
      if (first_piece < c.pieces)
        for (int piece = first_piece + (c.pieces - 1 - first_piece) / step * step; piece >= 0; piece -= step) {
          const Place place = place_of(piece);
          const std::int64_t channel = first_channel + place.channel;
          read_all(place);
          write(place, scalars.of_channel(c.weight_at(channel), kSecond ? c.a_at(channel) : A(0),
                                          kSecond ? c.b_at(channel) : A(0)));
        }
      if (sums_wanted) write_all_sums(sums, scalars);
    }
  }
}

// Shares out planes of whole vectors of V elements.
template <class S>
void set_planes(GroupNormCall<S>& c, int V) {
  const std::int64_t plane = (c.positions + V - 1) / V, most = 32 * kPieceVectors;
  const std::int64_t slots = plane > 0 ? (plane + most - 1) / most : 1;
  c.slots = static_cast<int>(slots);
  c.slot_vectors = static_cast<int>((plane + slots - 1) / slots);
  c.lanes = 1;
  while (c.lanes < 32 && c.lanes * kPieceVectors < c.slot_vectors) c.lanes *= 2;
  c.pieces = static_cast<int>(c.width * slots);
  c.by_slots = Divider::of(slots);
  c.threads = 32;
  while (c.threads < kHeldThreads && c.threads / c.lanes < c.pieces) c.threads *= 2;
  if (c.threads / c.lanes < c.pieces) c.threads = kPlaneThreads;
}

template <class S, class W>
cudaError_t launch_planes(const GroupNormCall<S>& c, cudaStream_t stream) {
  const auto kernel = c.threads == kPlaneThreads ? c.second ? group_norm_planes_kernel<false, true, S, W>
                                                            : group_norm_planes_kernel<false, false, S, W>
                      : c.second                 ? group_norm_planes_kernel<true, true, S, W>
                                                 : group_norm_planes_kernel<true, false, S, W>;
  return launch(kernel, grid_for(c.samples * c.groups), dim3(c.threads), 0, stream, c);
}

}  // namespace rk::cuda
