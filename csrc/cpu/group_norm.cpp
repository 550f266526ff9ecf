// group_norm_backward and its derivative on the CPU.  Formulas: math/group_norm.h.
//
// A unit of work is what shares its sums and lies together: one group of one sample where the channels are planes, one
// sample where they are innermost.  One thread sums over a unit and writes its results while the unit is in the cache.
// Where units are few, threads share their parts, pass by pass; the additions are the same either way, for every number
// of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../arguments/group_norm.h"
#include "../math/group_norm.h"
#include "elements.h"
#include "norm_sums.h"

namespace rk::cpu {
namespace {

// Planes: `count` channels of `length` positions each, `stride` apart.  Rows: `count` positions of `length` channels.
template <class A>
struct GroupNormPiece {
  const A *x, *g, *u;
  int64_t count, length, stride;
};

// What ChannelSlopes or ChannelBends say: of one channel, or of every channel as arrays.
template <class Each>
struct GroupNormCoefficients {
  Each mean, r;
  Each t_u, t_x, t_one, x_u, x_g, x_x, x_one;
};

// f(coefficients, offset) for every run of a piece: those of its channel, or those of all channels.
template <bool kPlanes, class A, class F>
RK_HOST_DEVICE void for_runs(const GroupNormPiece<A>& p, const GroupNormCoefficients<const A*>& k, const F& f) {
  for (int64_t i = 0; i < p.count; ++i) {
    if constexpr (kPlanes)
      f(GroupNormCoefficients<A>{k.mean[i], k.r[i], k.t_u[i], k.t_x[i], k.t_one[i], k.x_u[i], k.x_g[i], k.x_x[i],
                                 k.x_one[i]},
        i * p.stride);
    else
      f(k, i * p.stride);
  }
}

// totals[5 * channel + i] += the i-th of ChannelSums; the last three only where p.u is given.
template <class A>
RK_MULTIVERSION void plane_sums(const GroupNormPiece<A>& p, const A* means, const A* rs, double* totals) {
  for (int64_t c = 0; c < p.count; ++c, totals += 5) {
    const A *x = p.x + c * p.stride, *g = p.g + c * p.stride, mean = means[c], r = rs[c];
    if (p.u)
      norm_sums(NormRow<true, false, A>{x, g, p.u + c * p.stride, nullptr, mean, r}, p.length, totals);
    else
      norm_sums(NormRow<false, false, A>{x, g, nullptr, nullptr, mean, r}, p.length, totals);
  }
}

template <bool kPlanes, class A>
RK_MULTIVERSION void write_gg_grad(const GroupNormPiece<A>& p, const GroupNormCoefficients<const A*>& coefficients,
                                   A* out) {
  for_runs<kPlanes>(p, coefficients, [=](const auto& k, int64_t at) RK_INLINE_LAMBDA {
    const A *x = p.x + at, *u = p.u + at;
    A* __restrict__ to = out + at;
    for (int64_t j = 0; j < p.length; ++j) {
      const A xh = (x[j] - entry(k.mean, j)) * entry(k.r, j);
      to[j] = entry(k.t_u, j) * u[j] + (entry(k.t_x, j) * xh + entry(k.t_one, j));
    }
  });
}

template <bool kPlanes, bool kSecond, class A>
RK_HOST_DEVICE void grad_x_loop(const GroupNormPiece<A>& p, const GroupNormCoefficients<const A*>& coefficients,
                                A* out) {
  for_runs<kPlanes>(p, coefficients, [=](const auto& k, int64_t at) RK_INLINE_LAMBDA {
    const A *x = p.x + at, *g = p.g + at, *u = p.u + at;
    A* __restrict__ to = out + at;
    for (int64_t j = 0; j < p.length; ++j) {
      const A xh = (x[j] - entry(k.mean, j)) * entry(k.r, j);
      const A rest = entry(k.x_g, j) * g[j] + (entry(k.x_x, j) * xh + entry(k.x_one, j));
      to[j] = kSecond ? entry(k.x_u, j) * u[j] + rest : rest;
    }
  });
}

template <bool kPlanes, class A>
RK_MULTIVERSION void write_grad_x(const GroupNormPiece<A>& p, const GroupNormCoefficients<const A*>& k, A* out) {
  p.u ? grad_x_loop<kPlanes, true>(p, k, out) : grad_x_loop<kPlanes, false>(p, k, out);
}

// sums: five arrays of p.length
template <class A>
RK_MULTIVERSION void row_sums(const GroupNormPiece<A>& p, const A* mean, const A* r, A* sums) {
  if (p.u)
    column_sums<true>(p.count, p.length, p.stride, p.x, p.g, p.u, mean, r, sums);
  else
    column_sums<false, A>(p.count, p.length, p.stride, p.x, p.g, nullptr, mean, r, sums);
}

constexpr int64_t kSums = 5;              // of ChannelSums
constexpr int64_t kArrays = 9;            // of GroupNormCoefficients
constexpr int64_t kPartElements = 65536;  // of channels innermost: with the results, inside a core's L2 cache
constexpr int64_t kRunningRows = 32;      // that are added in the accumulation type, before double takes over

// The tensors of a call, and how its work is cut; vectors are in the accumulation type.
template <class A>
class GroupNormArguments {
 public:
  bool innermost, second;
  int64_t samples, channels, positions, groups;
  Input x, g, u;                                                // [N, C, S] in one layout; u: second derivative only
  const A *weight, *a = nullptr, *b = nullptr;                  // [C] or null
  const A *mean, *rstd;                                         // [N, groups]
  Output gg_grad, grad_x;                                       // like x
  A *sample_weight = nullptr, *sample_bias = nullptr;           // [N, C] or null
  int64_t units, unit_groups, unit_channels, parts, part_size;  // `part_size` channels or positions make a part

  GroupNormArguments(const Tensor& like_x, const Tensor& grad, const Tensor& m, const Tensor& r,
                     const std::optional<Tensor>& w, int64_t number, bool is_second)
      : second(is_second),
        samples(like_x.size(0)),
        channels(like_x.size(1)),
        positions(like_x.size(2)),
        groups(number),
        like_x_(like_x),
        transposed_(channels_innermost(like_x)) {
    x = dense(like_x);
    g = dense(grad);
    mean = vector(m);
    rstd = vector(r);
    weight = vector(w);
    // Planes of one position are rows of channels.
    innermost = transposed_ || positions == 1;
    if (innermost) {
      units = samples;
      unit_groups = groups;
      part_size = std::max<int64_t>(1, kPartElements / std::max<int64_t>(1, channels));
      parts = (positions + part_size - 1) / part_size;
    } else {
      units = samples * groups;
      unit_groups = 1;
      part_size = std::max<int64_t>(1, kPiece / std::max<int64_t>(1, positions));
      parts = (group_channels() + part_size - 1) / part_size;
    }
    unit_channels = unit_groups * group_channels();
  }

  int64_t group_channels() const { return channels / groups; }
  int64_t sums_size() const { return kSums * unit_channels * (innermost ? parts : 1); }

  const A* vector(const std::optional<Tensor>& t) {
    return t ? pointer<A>(kept_.emplace_back(torch::stable::contiguous(*t))) : nullptr;
  }
  // In the layout of x; zeros for an absent tensor.
  Input dense(const std::optional<Tensor>& t) {
    if (t) return Input(kept_.emplace_back(dense_in(transposed_, *t)));
    return Input(torch::stable::zero_(kept_.emplace_back(empty_in(transposed_, like_x_))));
  }
  Tensor result(bool needed, Output& out) const {
    const Tensor t = needed ? empty_in(transposed_, like_x_) : torch::stable::new_empty(like_x_, {0});
    out = Output(t, needed);
    return t;
  }
  // Room for the sums of every sample.
  A* make_samples(bool needed) { return needed ? pointer<A>(kept_.emplace_back(wide({samples, channels}))) : nullptr; }
  Tensor total(bool needed, const A* sums) const {
    const Tensor out = wide({needed ? channels : 0});
    if (needed) add_rows_in_double(samples, channels, sums, pointer<A>(out));
    return out;
  }

 private:
  Tensor wide(const std::vector<int64_t>& sizes) const {
    return torch::stable::new_empty(like_x_, sizes, accumulation_type(like_x_.scalar_type()));
  }

  Tensor like_x_;
  bool transposed_;
  std::vector<Tensor> kept_;
};

// Pieces of the three inputs in the accumulation type, and room for a piece of an output.
template <class A>
class Pieces {
 public:
  explicit Pieces(const GroupNormArguments<A>& a) : a_(a) {}

  // `count` runs of `length` elements, of as many channels or positions.  Converted runs are adjacent.
  GroupNormPiece<A> read(int64_t offset, int64_t count, int64_t length) {
    const int64_t n = count * length, stride = a_.innermost ? a_.channels : a_.positions;
    return {a_.x.read(offset, n, x_),
            a_.g.read(offset, n, g_),
            a_.u ? a_.u.read(offset, n, u_) : nullptr,
            count,
            length,
            a_.x.template holds<A>() ? stride : length};
  }

  template <class F>
  void write(const Output& out, int64_t offset, int64_t n, const F& f) {
    out.write(offset, n, out_, f);
  }

 private:
  const GroupNormArguments<A>& a_;
  Buffer<A> x_, g_, u_, out_;
};

// What one unit's passes leave for each other.
template <class A>
class Unit {
 public:
  Unit(const GroupNormArguments<A>& a, int64_t index, double* sums, A* arrays)
      : a_(a),
        sample_(a.innermost ? index : index / a.groups),
        first_group_(a.innermost ? 0 : index % a.groups),
        first_channel_(first_group_ * a.group_channels()),
        sums_(sums),
        arrays_(arrays) {}

  void prepare() {
    std::fill_n(sums_, a_.sums_size(), 0.0);
    for (int64_t c = 0; c < a_.unit_channels; ++c) {
      const int64_t row = sample_ * a_.groups + first_group_ + c / a_.group_channels();
      array(0)[c] = a_.mean[row];
      array(1)[c] = a_.rstd[row];
    }
  }

  void sum_part(int64_t part, Pieces<A>& pieces) {
    if (a_.innermost)
      sum_rows(part, pieces);
    else
      for_pieces(part, [&](int64_t c, int64_t offset, int64_t count, int64_t length) {
        plane_sums(pieces.read(offset, count, length), array(0) + c, array(1) + c, sums_ + kSums * c);
      });
  }

  // From sums to coefficients, and to this sample's share of the gradients of weight and bias.
  void finish() {
    const int64_t slab = kSums * a_.unit_channels;
    for (int64_t part = 1; a_.innermost && part < a_.parts; ++part)
      for (int64_t i = 0; i < slab; ++i) sums_[i] += sums_[part * slab + i];
    for (int64_t group = 0; group < a_.unit_groups; ++group) {
      const int64_t begin = group * a_.group_channels(), end = begin + a_.group_channels();
      const double r = double(array(1)[begin]), count = std::max(1.0, double(a_.group_channels() * a_.positions));
      NormSums<double> s{};
      for (int64_t c = begin; c < end; ++c) channel_sums(c).add_to(s, weight(c), vector(a_.a, c));
      const NormSlopes<double> slopes = norm_slopes(s.g, s.gx, r, count);
      const NormBends<double> bends = norm_bends(s, r, count);
      for (int64_t c = begin; c < end; ++c) a_.second ? set_bends(c, bends, r) : set_slopes(c, slopes);
    }
  }

  void write_part(int64_t part, Pieces<A>& pieces) {
    if (!a_.gg_grad && !a_.grad_x) return;
    for_pieces(part, [&](int64_t c, int64_t offset, int64_t count, int64_t length) {
      const GroupNormPiece<A> p = pieces.read(offset, count, length);
      const GroupNormCoefficients<const A*> k = coefficients(c);
      const int64_t n = count * length;
      if (a_.gg_grad)
        pieces.write(a_.gg_grad, offset, n,
                     [&](A* out) { a_.innermost ? write_gg_grad<false>(p, k, out) : write_gg_grad<true>(p, k, out); });
      if (a_.grad_x)
        pieces.write(a_.grad_x, offset, n,
                     [&](A* out) { a_.innermost ? write_grad_x<false>(p, k, out) : write_grad_x<true>(p, k, out); });
    });
  }

 private:
  A* array(int64_t i) const { return arrays_ + i * a_.unit_channels; }
  double vector(const A* v, int64_t c) const { return v ? double(v[first_channel_ + c]) : 0; }
  double weight(int64_t c) const { return a_.weight ? vector(a_.weight, c) : 1; }

  ChannelSums<double> channel_sums(int64_t c) const {
    const double* s = a_.innermost ? sums_ + c : sums_ + kSums * c;
    const int64_t step = a_.innermost ? a_.unit_channels : 1;
    return {s[0], s[step], s[2 * step], s[3 * step], s[4 * step]};
  }
  // Those of the channels from c on.
  GroupNormCoefficients<const A*> coefficients(int64_t c) const {
    const auto from = [&](int64_t i) { return array(i) + c; };
    return {from(0), from(1), from(2), from(3), from(4), from(5), from(6), from(7), from(8)};
  }
  void set_slopes(int64_t c, const NormSlopes<double>& group) {
    const ChannelSlopes<double> k = channel_slopes(group, weight(c));
    array(6)[c] = A(k.g);
    array(7)[c] = A(k.x);
    array(8)[c] = A(k.one);
    put(a_.sample_weight, c, channel_sums(c).gx);
    put(a_.sample_bias, c, channel_sums(c).g);
  }
  void set_bends(int64_t c, const NormBends<double>& group, double r) {
    const ChannelBends<double> k = channel_bends(group, r, weight(c), vector(a_.a, c), vector(a_.b, c));
    const double values[] = {k.t_u, k.t_x, k.t_one, k.x_u, k.x_g, k.x_x, k.x_one};
    for (int i = 0; i < 7; ++i) array(2 + i)[c] = A(values[i]);
    put(a_.sample_weight, c, channel_sums(c).weight_bend(group, r));
  }
  void put(A* out, int64_t c, double value) const {
    if (out) out[sample_ * a_.channels + first_channel_ + c] = A(value);
  }

  // f(first channel in the unit, offset, runs, length).  A piece is some planes, or a stretch of one; of channels
  // innermost, all channels of some positions, or some of one.
  template <class F>
  void for_pieces(int64_t part, const F& f) {
    const int64_t begin = part * a_.part_size;
    if (a_.innermost) {
      const int64_t end = std::min(a_.positions, begin + a_.part_size);
      for (int64_t c = 0; c < a_.channels; c += kPiece) {
        const int64_t width = std::min(a_.channels - c, kPiece);
        const int64_t rows = width == a_.channels ? std::min(kPiece / width, kRunningRows) : 1;
        for (int64_t j = begin; j < end; j += rows)
          f(c, (sample_ * a_.positions + j) * a_.channels + c, std::min(rows, end - j), width);
      }
    } else {
      const int64_t count = std::min(a_.unit_channels - begin, a_.part_size);  // of short planes, or one
      const int64_t offset = (sample_ * a_.channels + first_channel_ + begin) * a_.positions;
      for (int64_t j = 0; j < a_.positions; j += kPiece)
        f(begin, offset + j, count, std::min(a_.positions - j, kPiece));
    }
  }

  void sum_rows(int64_t part, Pieces<A>& pieces) {
    double* sums = sums_ + part * kSums * a_.unit_channels;
    A running[kSums * kPiece];
    int64_t channel = 0, width = 0, rows = 0;
    const auto flush = [&] {
      for (int64_t i = 0; i < kSums; ++i)
        add_in_double(sums + i * a_.unit_channels + channel, running + i * width, width);
      rows = 0;
    };
    for_pieces(part, [&](int64_t c, int64_t offset, int64_t count, int64_t w) {
      if (rows && (c != channel || rows + count > kRunningRows)) flush();
      if (!rows) std::fill_n(running, kSums * w, A(0));
      channel = c;
      width = w;
      row_sums(pieces.read(offset, count, w), array(0) + c, array(1) + c, running);
      rows += count;
    });
    flush();
  }

  const GroupNormArguments<A>& a_;
  int64_t sample_, first_group_, first_channel_;
  double* sums_;
  A* arrays_;
};

template <class A>
void run(const GroupNormArguments<A>& a) {
  const int64_t unit_elements = a.unit_channels * a.positions, sums = a.sums_size(), arrays = kArrays * a.unit_channels;
  if (a.units >= 2 * int64_t(torch::stable::get_num_threads()) || a.parts <= 1) {
    torch::stable::parallel_for(0, a.units, rows_per_thread(unit_elements), [&](int64_t begin, int64_t end) {
      std::vector<double> own_sums(sums);
      std::vector<A> own_arrays(arrays);
      Pieces<A> pieces(a);
      for (int64_t i = begin; i < end; ++i) {
        Unit<A> unit(a, i, own_sums.data(), own_arrays.data());
        unit.prepare();
        for (int64_t part = 0; part < a.parts; ++part) unit.sum_part(part, pieces);
        unit.finish();
        for (int64_t part = a.parts; part-- > 0;) unit.write_part(part, pieces);  // the last is in the cache still
      }
      finish_streams();
    });
    return;
  }
  std::vector<double> all_sums(a.units * sums);
  std::vector<A> all_arrays(a.units * arrays);
  const auto unit = [&](int64_t i) {
    return Unit<A>(a, i, all_sums.data() + i * sums, all_arrays.data() + i * arrays);
  };
  const auto for_parts = [&](const auto& f) {
    torch::stable::parallel_for(0, a.units * a.parts, rows_per_thread(unit_elements / a.parts),
                                [&](int64_t begin, int64_t end) {
                                  Pieces<A> pieces(a);
                                  for (int64_t i = begin; i < end; ++i) f(unit(i / a.parts), i % a.parts, pieces);
                                  finish_streams();
                                });
  };
  for (int64_t i = 0; i < a.units; ++i) unit(i).prepare();
  for_parts([](Unit<A> u, int64_t part, Pieces<A>& pieces) { u.sum_part(part, pieces); });
  for (int64_t i = 0; i < a.units; ++i) unit(i).finish();
  for_parts([](Unit<A> u, int64_t part, Pieces<A>& pieces) { u.write_part(part, pieces); });
}

using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;

ThreeTensors group_norm_backward(Tensor grad, Tensor x, std::optional<Tensor> weight, Tensor mean, Tensor rstd,
                                 int64_t groups, bool need_x, bool need_weight, bool need_bias) {
  const std::optional<Tensor> none;
  check_group_norm("group_norm_backward", none, none, none, grad, x, weight, mean, rstd, groups);
  return visit_accumulation(x.scalar_type(), [&]<class A>(A) -> ThreeTensors {
    GroupNormArguments<A> call(x, grad, mean, rstd, weight, groups, false);
    const Tensor grad_x = call.result(need_x, call.grad_x);
    call.sample_weight = call.make_samples(need_weight);
    call.sample_bias = call.make_samples(need_bias);
    run(call);
    return {grad_x, call.total(need_weight, call.sample_weight), call.total(need_bias, call.sample_bias)};
  });
}

ThreeTensors group_norm_double_backward(std::optional<Tensor> u, std::optional<Tensor> a, std::optional<Tensor> b,
                                        Tensor grad, Tensor x, std::optional<Tensor> weight, Tensor mean, Tensor rstd,
                                        int64_t groups, bool need_grad, bool need_x, bool need_weight) {
  check_group_norm("group_norm_double_backward", u, a, b, grad, x, weight, mean, rstd, groups);
  return visit_accumulation(x.scalar_type(), [&]<class A>(A) -> ThreeTensors {
    GroupNormArguments<A> call(x, grad, mean, rstd, weight, groups, true);
    call.u = call.dense(u);
    call.a = call.vector(a);
    call.b = call.vector(b);
    const Tensor gg_grad = call.result(need_grad, call.gg_grad), grad_x = call.result(need_x, call.grad_x);
    call.sample_weight = call.make_samples(need_weight);
    run(call);
    return {gg_grad, grad_x, call.total(need_weight, call.sample_weight)};
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(robustkern, CPU, m) {
  m.impl("group_norm_backward", TORCH_BOX(&group_norm_backward));
  m.impl("group_norm_double_backward", TORCH_BOX(&group_norm_double_backward));
}

}  // namespace rk::cpu
