// The sweeps of batch_norm_double_backward over memory: units of work, their sums, what becomes of these, the results.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "batch_norm_loops.h"
#include "pieces.h"

namespace rk::cpu {

constexpr int64_t kUnit = 16384;        // elements of a unit along a channel: its five tensors fit a core's L2 cache
constexpr int64_t kLeastStream = 1024;  // bytes of a run that is worth to be written past the cache
constexpr int64_t kRowUnit = 65536;     // elements of a unit of rows
constexpr int64_t kTile = 8192;    // elements of rows that are summed in the accumulation type before they go to double
constexpr int64_t kWritten = 256;  // elements of rows that are written together: so few wait in the store queue

template <class A>
A value_or(const A* values, int64_t i, A otherwise) {
  return values ? values[i] : otherwise;
}

template <class A>
class Call {
 public:
  int64_t images, channels, inner;  // [N, C, S]
  ScalarType dtype;
  int64_t item;
  const char *u, *g, *x;  // x is null where nothing depends on it
  char *grad, *grad_x;    // or null
  const A *weight, *a, *b, *mean, *invstd;
  A* grad_weight;  // or null
  bool training;
  int64_t cotangents = 1;  // u, g and grad are [K, N, C, S]
  A* sum_x = nullptr;      // of several cotangents, in the place of grad_x

  int64_t size() const { return images * channels * inner; }

  void run() {
    if (size() * cotangents == 0) {
      if (sum_x) std::fill(sum_x, sum_x + size(), A(0));
      if (grad_weight) std::fill(grad_weight, grad_weight + channels, A(0));
      return;
    }
    coefficients_.resize(channels);
    const int64_t bytes = cotangents * size() * item, run = inner * item;
    streamed_ = is_wide() && bytes >= kStreamedBytes && (inner == 1 || run >= kLeastStream);
    if (cotangents == 1) return run_one();
    std::vector<Call> calls;
    for (int64_t k = 0; k < cotangents; ++k) calls.push_back(one_of(k));
    if (inner > 1 && training && has_channel_for_each_thread())
      for_channels([&](int64_t channel, Sums* sums) {
        for (Call& call : calls) call.run_channel(channel, sums);
      });
    else
      for (Call& call : calls) call.run_one();
  }

 private:
  bool is_wide() const { return item == sizeof(A); }  // stored as it is computed with
  // Loops along channels take it as it is stored.
  bool is_paired() const { return std::is_same_v<A, float> && dtype == ScalarType::BFloat16 && !sum_x; }
  bool writes() const { return grad || grad_x || sum_x; }

  Call one_of(int64_t cotangent) const {
    const int64_t offset = cotangent * size() * item;
    Call call = *this;
    call.u += offset;
    call.g += offset;
    if (call.grad) call.grad += offset;
    call.cotangents = 1;
    call.adds_ = cotangent > 0;
    return call;
  }

  void run_one() { inner == 1 ? run_across() : run_along(); }

  void set_coefficients(int64_t c, const Sums& sums) {
    const double r = invstd[c];
    const auto k = batch_norm_coefficients<double>({sums.u, sums.g, sums.ug, sums.ux * r, sums.gx * r},
                                                   double(images) * double(inner), value_or(weight, c, A(1)), r,
                                                   value_or(a, c, A(0)), value_or(b, c, A(0)), training);
    coefficients_[c] = {A(k.grad_u), A(k.grad_x), A(k.grad_1), A(k.x_u), A(k.x_g), A(k.x_x), A(k.x_1), A(k.weight)};
    if (grad_weight) grad_weight[c] = A(k.weight) + (adds_ ? grad_weight[c] : A(0));
  }

  // ---- [N, C, S]: the units of a channel, each some runs of adjacent elements

  int64_t units_of_image() const { return (inner + kUnit - 1) / kUnit; }
  int64_t images_of_unit() const { return std::max<int64_t>(1, kUnit / inner); }
  int64_t units() const {
    return inner >= kUnit ? images * units_of_image() : (images + images_of_unit() - 1) / images_of_unit();
  }

  // Calls f(offset of the first run, runs, length) with pieces of at most kPiece elements.
  template <class F>
  void for_runs(int64_t channel, int64_t unit, const F& f) const {
    const int64_t stride = channels * inner;
    if (inner >= kPiece) {
      const bool whole = inner < kUnit;
      const int64_t first = whole ? unit * images_of_unit() : unit / units_of_image();
      const int64_t last = whole ? std::min(images, first + images_of_unit()) : first + 1;
      const int64_t begin = whole ? 0 : unit % units_of_image() * kUnit, end = std::min(inner, begin + kUnit);
      for (int64_t n = first; n < last; ++n)
        for (int64_t s = begin; s < end; s += kPiece)
          f(n * stride + channel * inner + s, int64_t(1), std::min(kPiece, end - s));
    } else {
      const int64_t first = unit * images_of_unit(), last = std::min(images, first + images_of_unit());
      const int64_t runs = streamed_ || (sum_x && !is_wide()) ? 1 : std::max<int64_t>(1, kPiece / inner);
      for (int64_t n = first; n < last; n += runs) f(n * stride + channel * inner, std::min(runs, last - n), inner);
    }
  }

  const A* read(const char* base, int64_t offset, int64_t runs, int64_t length, A* buffer) const {
    if (!base) return nullptr;
    if (is_wide()) return reinterpret_cast<const A*>(base) + offset;
    for (int64_t run = 0; run < runs; ++run)
      read_piece(dtype, base + (offset + run * channels * inner) * item, buffer + run * length, length,
                 channels * inner * item);
    return buffer;
  }

  void write(char* base, int64_t offset, int64_t runs, int64_t length, const A* buffer) const {
    if (!base || (is_wide() && !streamed_)) return;
    if (streamed_) return stream_piece(buffer, base + offset * item, length * item);  // runs = 1
    for (int64_t run = 0; run < runs; ++run)
      write_piece(dtype, buffer + run * length, base + (offset + run * channels * inner) * item, length);
  }

  A* target(char* base, int64_t offset, A* buffer) const {
    return !base ? nullptr : is_wide() && !streamed_ ? reinterpret_cast<A*>(base) + offset : buffer;
  }

  template <class S>
  static const S* stored(const char* base, int64_t offset) {
    return base ? reinterpret_cast<const S*>(base) + offset : nullptr;
  }
  template <class S>
  static S* stored(char* base, int64_t offset) {
    return base ? reinterpret_cast<S*>(base) + offset : nullptr;
  }

  Sums sums_along_unit(int64_t channel, int64_t unit) const {
    Sums sums;
    if constexpr (std::is_same_v<A, float>) {
      using S = BFloat16;
      if (is_paired()) {
        for_runs(channel, unit, [&](int64_t offset, int64_t runs, int64_t length) {
          sums_along(stored<S>(u, offset), stored<S>(g, offset), stored<S>(x, offset), runs, channels * inner, length,
                     mean[channel], sums);
        });
        return sums;
      }
    }
    alignas(64) A buffer[3][kPiece];
    for_runs(channel, unit, [&](int64_t offset, int64_t runs, int64_t length) {
      const int64_t stride = is_wide() ? channels * inner : length;
      sums_along(read(u, offset, runs, length, buffer[0]), read(g, offset, runs, length, buffer[1]),
                 read(x, offset, runs, length, buffer[2]), runs, stride, length, mean[channel], sums);
    });
    return sums;
  }

  void apply_along_unit(int64_t channel, int64_t unit) const {
    if constexpr (std::is_same_v<A, float>) {
      using S = BFloat16;
      if (is_paired())
        return for_runs(channel, unit, [&](int64_t offset, int64_t runs, int64_t length) {
          const Place<S> place{stored<S>(u, offset),    stored<S>(g, offset),      stored<S>(x, offset),
                               stored<S>(grad, offset), stored<S>(grad_x, offset), false};
          apply_along(place, runs, channels * inner, length, mean[channel], coefficients_[channel]);
        });
    }
    alignas(64) A buffer[5][kPiece];
    for_runs(channel, unit, [&](int64_t offset, int64_t runs, int64_t length) {
      const int64_t stride = is_wide() ? channels * inner : length;
      const Place<A> place{read(u, offset, runs, length, buffer[0]),
                           read(g, offset, runs, length, buffer[1]),
                           read(x, offset, runs, length, buffer[2]),
                           target(grad, offset, buffer[3]),
                           sum_x ? sum_x + offset : target(grad_x, offset, buffer[4]),
                           adds_};
      apply_along(place, runs, stride, length, mean[channel], coefficients_[channel]);
      write(grad, offset, runs, length, buffer[3]);
      write(grad_x, offset, runs, length, buffer[4]);
    });
  }

  bool has_channel_for_each_thread() const { return channels >= 4 * int64_t(torch::stable::get_num_threads()); }

  // A channel is one thread's, which still has it in its cache when it comes to the results.
  template <class F>
  void for_channels(const F& f) const {
    std::vector<Sums> sums(channels * units());
    torch::stable::parallel_for(0, channels, rows_per_thread(cotangents * images * inner),
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t c = begin; c < end; ++c) f(c, sums.data() + c * units());
                                  finish_streams();
                                });
  }

  void run_channel(int64_t channel, Sums* sums) {
    Sums total;
    for (int64_t unit = 0; unit < units(); ++unit) {
      sums[unit] = sums_along_unit(channel, unit);
      add(total, sums[unit]);
    }
    set_coefficients(channel, total);
    for (int64_t unit = units(); writes() && unit-- > 0;) apply_along_unit(channel, unit);
  }

  void run_along() {
    if (training && has_channel_for_each_thread())
      return for_channels([this](int64_t channel, Sums* sums) { run_channel(channel, sums); });
    const int64_t all = units();
    std::vector<Sums> sums(channels * all);
    const auto finish = [&](int64_t c) {
      Sums total;
      for (int64_t unit = 0; unit < all; ++unit) add(total, sums[c * all + unit]);
      set_coefficients(c, total);
    };
    if (!training) {  // the coefficients do not wait for the sums: one sweep
      for (int64_t c = 0; c < channels; ++c) set_coefficients(c, {});
      torch::stable::parallel_for(0, channels * all, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          if (grad_weight) sums[i] = sums_along_unit(i / all, i % all);
          if (writes()) apply_along_unit(i / all, i % all);
        }
        finish_streams();
      });
      for (int64_t c = 0; grad_weight && c < channels; ++c) finish(c);
    } else {
      torch::stable::parallel_for(0, channels * all, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) sums[i] = sums_along_unit(i / all, i % all);
      });
      for (int64_t c = 0; c < channels; ++c) finish(c);
      if (writes())
        torch::stable::parallel_for(0, channels * all, 1, [&](int64_t begin, int64_t end) {
          for (int64_t i = end; i-- > begin;) apply_along_unit(i / all, i % all);
          finish_streams();
        });
    }
  }

  // ---- [P, C, 1]: tiles of rows

  int64_t rows_of_tile() const { return std::clamp<int64_t>(kTile / channels, 1, 128); }
  int64_t rows_written() const { return std::clamp<int64_t>(kWritten / channels, 1, 128); }
  int64_t rows_of_unit() const {
    const int64_t tiles = std::max<int64_t>(1, kRowUnit / (rows_of_tile() * channels));
    return tiles * rows_of_tile();
  }

  // Tile by tile, in parts of so many rows.
  template <class F>
  void for_tiles(int64_t unit, bool backwards, int64_t part, const F& f) const {
    const int64_t first = unit * rows_of_unit(), last = std::min(images, first + rows_of_unit()), tile = rows_of_tile();
    const int64_t tiles = (last - first + tile - 1) / tile;
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t begin = first + (backwards ? tiles - 1 - i : i) * tile, end = std::min(last, begin + tile);
      for (int64_t row = begin; row < end; row += part) f(row * channels, std::min(part, end - row));
    }
  }

  const A* read_rows(const char* base, int64_t offset, int64_t count, std::vector<A>& buffer) const {
    if (!base) return nullptr;
    if (is_wide()) return reinterpret_cast<const A*>(base) + offset;
    buffer.resize(rows_of_tile() * channels);
    read_piece(dtype, base + offset * item, buffer.data(), count);
    return buffer.data();
  }

  void write_rows(char* base, int64_t offset, int64_t count, const std::vector<A>& buffer) const {
    if (base && streamed_)
      stream_piece(buffer.data(), base + offset * item, count * item);
    else if (base && !is_wide())
      write_piece(dtype, buffer.data(), base + offset * item, count);
  }

  struct Buffers {
    std::vector<A> u, g, x, grad, grad_x;
  };

  void sums_across_unit(int64_t unit, Sums* sums, Buffers& buffer) const {
    for_tiles(unit, false, rows_of_tile(), [&](int64_t offset, int64_t rows) {
      const int64_t count = rows * channels;
      sums_across(read_rows(u, offset, count, buffer.u), read_rows(g, offset, count, buffer.g),
                  read_rows(x, offset, count, buffer.x), rows, channels, mean, sums);
    });
  }

  void apply_across_unit(int64_t unit, const ChannelCoefficients<A>& c, Buffers& buffer) const {
    for_tiles(unit, true, rows_written(), [&](int64_t offset, int64_t rows) {
      const int64_t count = rows * channels;
      if (!is_wide() || streamed_) {
        buffer.grad.resize(rows_written() * channels);
        buffer.grad_x.resize(rows_written() * channels);
      }
      const Place<A> place{read_rows(u, offset, count, buffer.u),
                           read_rows(g, offset, count, buffer.g),
                           read_rows(x, offset, count, buffer.x),
                           target(grad, offset, buffer.grad.data()),
                           sum_x ? sum_x + offset : target(grad_x, offset, buffer.grad_x.data()),
                           adds_};
      apply_across(place, rows, channels, c);
      write_rows(grad, offset, count, buffer.grad);
      write_rows(grad_x, offset, count, buffer.grad_x);
    });
  }

  void run_across() {
    const int64_t all = (images + rows_of_unit() - 1) / rows_of_unit();
    const bool summed = training || grad_weight;
    std::vector<Sums> sums(summed ? all * channels : 0);
    const auto finish = [&] {
      for (int64_t c = 0; c < channels; ++c) {
        Sums total;
        for (int64_t unit = 0; summed && unit < all; ++unit) add(total, sums[unit * channels + c]);
        set_coefficients(c, total);
      }
    };
    if (summed)
      torch::stable::parallel_for(0, all, 1, [&](int64_t begin, int64_t end) {
        Buffers buffer;
        for (int64_t unit = begin; unit < end; ++unit) sums_across_unit(unit, sums.data() + unit * channels, buffer);
      });
    finish();
    if (!writes()) return;
    std::vector<A> columns(7 * channels);
    A* const column = columns.data();
    for (int64_t c = 0; c < channels; ++c) {
      const auto& k = coefficients_[c];
      const A values[7] = {k.grad_u, k.grad_x, k.grad_1, k.x_u, k.x_g, k.x_x, k.x_1};
      for (int i = 0; i < 7; ++i) column[i * channels + c] = values[i];
    }
    const ChannelCoefficients<A> c{mean,
                                   column,
                                   column + channels,
                                   column + 2 * channels,
                                   column + 3 * channels,
                                   column + 4 * channels,
                                   column + 5 * channels,
                                   column + 6 * channels};
    torch::stable::parallel_for(0, all, 1, [&](int64_t begin, int64_t end) {
      Buffers buffer;
      for (int64_t unit = end; unit-- > begin;) apply_across_unit(unit, c, buffer);  // what was read last comes first
      finish_streams();
    });
  }

  std::vector<BatchNormCoefficients<A>> coefficients_;
  bool streamed_ = false, adds_ = false;  // adds_: to what the cotangents before have left
};

}  // namespace rk::cpu
