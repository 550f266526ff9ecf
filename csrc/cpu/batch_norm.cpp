// batch_norm_double_backward on the CPU.  Formulas: math/batch_norm.h.
//
// Two sweeps, one for five sums a channel and one for the results: u, g and x are read twice and two tensors written, 8
// elements moved for each element of x, and 5 where the second sweep finds its channel in the cache.  Of K cotangents a
// thread takes one channel after the other, so that x and the sum of grad_x stay in its cache: 3 K + 2.  Work is cut into
// units of fixed size, whose sums are added in order: the same bits for every number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../arguments/batch_norm.h"
#include "batch_norm_loops.h"
#include "pieces.h"

namespace rk::cpu {
namespace {

constexpr int64_t kUnit = 16384;        // elements of a unit along a channel: its five tensors fit a core's L2 cache
constexpr int64_t kLeastStream = 1024;  // bytes of a run worth writing past the cache
constexpr int64_t kRowUnit = 65536;     // elements of a unit of rows
constexpr int64_t kTile = 8192;    // elements of rows that are summed in the accumulation type before they go to double
constexpr int64_t kWritten = 256;  // elements of rows that are written together: so few wait in the store queue

template <class A>
struct BatchNormArguments {
  int64_t images, channels, inner;  // [N, C, S]
  ScalarType dtype;
  bool training;
  int64_t cotangents;     // u, g and grad are [K, N, C, S]
  const char *u, *g, *x;  // x is null where nothing depends on it
  char *grad, *grad_x;    // or null
  A* sum_x;               // of several cotangents, in the place of grad_x; or null
  const A *weight, *a, *b, *mean, *invstd;
  A* grad_weight;     // or null
  bool adds = false;  // to what the cotangents before have left

  int64_t size() const { return images * channels * inner; }
  int64_t item() const { return item_size(dtype); }
  bool is_wide() const { return item() == sizeof(A); }  // stored as it is computed with
  bool writes() const { return grad || grad_x || sum_x; }
  bool streamed() const {
    return is_wide() && cotangents * size() * item() >= kStreamedBytes &&
           (inner == 1 || inner * item() >= kLeastStream);
  }

  BatchNormArguments of(int64_t cotangent) const {
    BatchNormArguments one = *this;
    const int64_t offset = cotangent * size() * item();
    one.u += offset;
    one.g += offset;
    if (grad) one.grad += offset;
    one.adds = cotangent > 0;
    return one;
  }

  BatchNormCoefficients<A> coefficients(int64_t c, const Sums& sums) const {
    const auto value_or = [c](const A* values, A otherwise) { return values ? values[c] : otherwise; };
    const double r = invstd[c];
    const auto k = batch_norm_coefficients<double>({sums.u, sums.g, sums.ug, sums.ux * r, sums.gx * r},
                                                   double(images) * double(inner), value_or(weight, A(1)), r,
                                                   value_or(a, A(0)), value_or(b, A(0)), training);
    return {A(k.grad_u), A(k.grad_x), A(k.grad_1), A(k.x_u), A(k.x_g), A(k.x_x), A(k.x_1), A(k.weight)};
  }

  // The coefficients, and with them the gradient of weight.
  BatchNormCoefficients<A> finish(int64_t c, const Sums& sums) const {
    const BatchNormCoefficients<A> k = coefficients(c, sums);
    if (grad_weight) grad_weight[c] = k.weight + (adds ? grad_weight[c] : A(0));
    return k;
  }
};

// Where an output at `offset` is computed: in its own place, or in a buffer that is written from there.
template <class S>
S* target(char* base, bool in_place, int64_t offset, S* buffer) {
  return !base ? nullptr : in_place ? reinterpret_cast<S*>(base) + offset : buffer;
}

// One cotangent, channel by channel: the units of a channel, each some runs of adjacent elements.  S is what the loops
// take: the accumulation type, or BFloat16 as it is stored.
template <class S, class A>
class AlongChannels {
 public:
  explicit AlongChannels(const BatchNormArguments<A>& a) : a_(a), coefficients_(a.channels) {}

  // By one thread, which still has the channel in its cache when it comes to the results.
  void run_channel(int64_t channel) {
    Sums total;
    for (int64_t unit = 0; unit < units_; ++unit) add(total, sums_of(channel, unit));
    coefficients_[channel] = a_.finish(channel, total);
    for (int64_t unit = units_; a_.writes() && unit-- > 0;) apply(channel, unit);
  }

  // By all threads, which share the units of all channels.
  void run() {
    std::vector<Sums> sums(a_.channels * units_);
    const auto sum = [&](int64_t i) { sums[i] = sums_of(i / units_, i % units_); };
    const auto write = [&](int64_t i) { apply(i / units_, i % units_); };
    const auto finish = [&] {
      for (int64_t c = 0; c < a_.channels; ++c) {
        Sums total;
        for (int64_t unit = 0; unit < units_; ++unit) add(total, sums[c * units_ + unit]);
        coefficients_[c] = a_.finish(c, total);
      }
    };
    if (a_.training) {
      share(sum);
      finish();
      if (a_.writes()) share(write, /*backwards=*/true);
    } else {  // the coefficients do not wait for the sums: one sweep
      for (int64_t c = 0; c < a_.channels; ++c) coefficients_[c] = a_.coefficients(c, {});
      share([&](int64_t i) {
        if (a_.grad_weight) sum(i);
        if (a_.writes()) write(i);
      });
      if (a_.grad_weight) finish();
    }
  }

 private:
  // f(unit) for all units; backwards: what a thread has read last comes first.
  template <class F>
  void share(const F& f, bool backwards = false) const {
    torch::stable::parallel_for(0, a_.channels * units_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(backwards ? begin + (end - 1 - i) : i);
      finish_streams();
    });
  }

  int64_t units_of_image() const { return (a_.inner + kUnit - 1) / kUnit; }
  int64_t images_of_unit() const { return std::max<int64_t>(1, kUnit / a_.inner); }
  int64_t count_units() const {
    return a_.inner >= kUnit ? a_.images * units_of_image() : (a_.images + images_of_unit() - 1) / images_of_unit();
  }

  // Calls f(offset of the first run, runs, length) with pieces of at most kPiece elements.
  template <class F>
  void for_runs(int64_t channel, int64_t unit, const F& f) const {
    const int64_t inner = a_.inner;
    if (inner >= kPiece) {
      const bool whole = inner < kUnit;
      const int64_t first = whole ? unit * images_of_unit() : unit / units_of_image();
      const int64_t last = whole ? std::min(a_.images, first + images_of_unit()) : first + 1;
      const int64_t begin = whole ? 0 : unit % units_of_image() * kUnit, end = std::min(inner, begin + kUnit);
      for (int64_t n = first; n < last; ++n)
        for (int64_t s = begin; s < end; s += kPiece)
          f(n * stride_ + channel * inner + s, int64_t(1), std::min(kPiece, end - s));
    } else {
      const int64_t first = unit * images_of_unit(), last = std::min(a_.images, first + images_of_unit());
      const int64_t runs = streamed_ || (a_.sum_x && !direct_) ? 1 : std::max<int64_t>(1, kPiece / inner);
      for (int64_t n = first; n < last; n += runs) f(n * stride_ + channel * inner, std::min(runs, last - n), inner);
    }
  }

  const S* read(const char* base, int64_t offset, int64_t runs, int64_t length, S* buffer) const {
    if (!base) return nullptr;
    if (direct_) return reinterpret_cast<const S*>(base) + offset;
    if constexpr (std::is_same_v<S, A>)
      for (int64_t run = 0; run < runs; ++run)
        read_piece(a_.dtype, base + (offset + run * stride_) * item_, buffer + run * length, length, stride_ * item_);
    return buffer;
  }

  void write(char* base, int64_t offset, int64_t runs, int64_t length, const S* buffer) const {
    if (!base || (direct_ && !streamed_)) return;
    if (streamed_) return stream_piece(buffer, base + offset * item_, length * item_);  // runs = 1
    if constexpr (std::is_same_v<S, A>)
      for (int64_t run = 0; run < runs; ++run)
        write_piece(a_.dtype, buffer + run * length, base + (offset + run * stride_) * item_, length);
  }

  Sums sums_of(int64_t channel, int64_t unit) const {
    Sums sums;
    alignas(64) S buffer[3][kPiece];
    for_runs(channel, unit, [&](int64_t offset, int64_t runs, int64_t length) {
      sums_along(read(a_.u, offset, runs, length, buffer[0]), read(a_.g, offset, runs, length, buffer[1]),
                 read(a_.x, offset, runs, length, buffer[2]), runs, direct_ ? stride_ : length, length,
                 a_.mean[channel], sums);
    });
    return sums;
  }

  void apply(int64_t channel, int64_t unit) const {
    alignas(64) S buffer[5][kPiece];
    const bool in_place = direct_ && !streamed_;
    for_runs(channel, unit, [&](int64_t offset, int64_t runs, int64_t length) {
      Place<S> place{read(a_.u, offset, runs, length, buffer[0]),    read(a_.g, offset, runs, length, buffer[1]),
                     read(a_.x, offset, runs, length, buffer[2]),    target(a_.grad, in_place, offset, buffer[3]),
                     target(a_.grad_x, in_place, offset, buffer[4]), a_.adds};
      if constexpr (std::is_same_v<S, A>)
        if (a_.sum_x) place.grad_x = a_.sum_x + offset;
      apply_along(place, runs, direct_ ? stride_ : length, length, a_.mean[channel], coefficients_[channel]);
      write(a_.grad, offset, runs, length, buffer[3]);
      write(a_.grad_x, offset, runs, length, buffer[4]);
    });
  }

  const BatchNormArguments<A> a_;
  const int64_t item_ = a_.item(), stride_ = a_.channels * a_.inner, units_ = count_units();
  const bool direct_ = item_ == sizeof(S), streamed_ = a_.streamed();
  std::vector<BatchNormCoefficients<A>> coefficients_;
};

// One cotangent of [P, C, 1]: tiles of rows, units of some tiles.
template <class A>
class AcrossChannels {
 public:
  explicit AcrossChannels(const BatchNormArguments<A>& a) : a_(a) {}

  void run() const {
    const int64_t units = (a_.images + unit_rows_ - 1) / unit_rows_;
    const bool summed = a_.training || a_.grad_weight;
    std::vector<Sums> sums(summed ? units * a_.channels : 0);
    if (summed)
      torch::stable::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
        Buffers buffer;
        for (int64_t unit = begin; unit < end; ++unit) add_sums(unit, sums.data() + unit * a_.channels, buffer);
      });
    std::vector<A> columns(7 * a_.channels);
    for (int64_t c = 0; c < a_.channels; ++c) {
      Sums total;
      for (int64_t unit = 0; summed && unit < units; ++unit) add(total, sums[unit * a_.channels + c]);
      const BatchNormCoefficients<A> k = a_.finish(c, total);
      const A values[7] = {k.grad_u, k.grad_x, k.grad_1, k.x_u, k.x_g, k.x_x, k.x_1};
      for (int i = 0; i < 7; ++i) columns[i * a_.channels + c] = values[i];
    }
    if (!a_.writes()) return;
    const auto column = [&](int i) { return columns.data() + i * a_.channels; };
    const ChannelCoefficients<A> c{a_.mean,   column(0), column(1), column(2),
                                   column(3), column(4), column(5), column(6)};
    torch::stable::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
      Buffers buffer;
      for (int64_t unit = end; unit-- > begin;) apply(unit, c, buffer);  // what was read last comes first
      finish_streams();
    });
  }

 private:
  struct Buffers {
    std::vector<A> u, g, x, grad, grad_x;
  };

  // Tile by tile, in parts of so many rows.
  template <class F>
  void for_tiles(int64_t unit, bool backwards, int64_t part, const F& f) const {
    const int64_t first = unit * unit_rows_, last = std::min(a_.images, first + unit_rows_);
    const int64_t tiles = (last - first + tile_rows_ - 1) / tile_rows_;
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t begin = first + (backwards ? tiles - 1 - i : i) * tile_rows_,
                    end = std::min(last, begin + tile_rows_);
      for (int64_t row = begin; row < end; row += part) f(row * a_.channels, std::min(part, end - row));
    }
  }

  const A* read(const char* base, int64_t offset, int64_t rows, std::vector<A>& buffer) const {
    if (!base) return nullptr;
    if (a_.is_wide()) return reinterpret_cast<const A*>(base) + offset;
    buffer.resize(tile_rows_ * a_.channels);
    read_piece(a_.dtype, base + offset * a_.item(), buffer.data(), rows * a_.channels);
    return buffer.data();
  }

  void write(char* base, int64_t offset, int64_t rows, const std::vector<A>& buffer) const {
    if (base && streamed_)
      stream_piece(buffer.data(), base + offset * a_.item(), rows * a_.channels * a_.item());
    else if (base && !a_.is_wide())
      write_piece(a_.dtype, buffer.data(), base + offset * a_.item(), rows * a_.channels);
  }

  void add_sums(int64_t unit, Sums* sums, Buffers& buffer) const {
    for_tiles(unit, false, tile_rows_, [&](int64_t offset, int64_t rows) {
      sums_across(read(a_.u, offset, rows, buffer.u), read(a_.g, offset, rows, buffer.g),
                  read(a_.x, offset, rows, buffer.x), rows, a_.channels, a_.mean, sums);
    });
  }

  void apply(int64_t unit, const ChannelCoefficients<A>& c, Buffers& buffer) const {
    const bool in_place = a_.is_wide() && !streamed_;
    if (!in_place)
      for (std::vector<A>* out : {&buffer.grad, &buffer.grad_x}) out->resize(written_rows_ * a_.channels);
    for_tiles(unit, true, written_rows_, [&](int64_t offset, int64_t rows) {
      const Place<A> place{read(a_.u, offset, rows, buffer.u),
                           read(a_.g, offset, rows, buffer.g),
                           read(a_.x, offset, rows, buffer.x),
                           target(a_.grad, in_place, offset, buffer.grad.data()),
                           a_.sum_x ? a_.sum_x + offset : target(a_.grad_x, in_place, offset, buffer.grad_x.data()),
                           a_.adds};
      apply_across(place, rows, a_.channels, c);
      write(a_.grad, offset, rows, buffer.grad);
      write(a_.grad_x, offset, rows, buffer.grad_x);
    });
  }

  const BatchNormArguments<A> a_;
  const int64_t tile_rows_ = std::clamp<int64_t>(kTile / a_.channels, 1, 128);
  const int64_t written_rows_ = std::clamp<int64_t>(kWritten / a_.channels, 1, 128);
  const int64_t unit_rows_ = std::max<int64_t>(1, kRowUnit / (tile_rows_ * a_.channels)) * tile_rows_;
  const bool streamed_ = a_.streamed();
};

template <class S, class A>
void run_along(const BatchNormArguments<A>& a) {
  std::vector<AlongChannels<S, A>> sweeps;
  for (int64_t k = 0; k < a.cotangents; ++k) sweeps.emplace_back(a.of(k));
  if (a.training && a.channels >= 4 * int64_t(torch::stable::get_num_threads()))
    torch::stable::parallel_for(0, a.channels, rows_per_thread(a.cotangents * a.images * a.inner),
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t c = begin; c < end; ++c)
                                    for (auto& sweep : sweeps) sweep.run_channel(c);
                                  finish_streams();
                                });
  else
    for (auto& sweep : sweeps) sweep.run();
}

template <class A>
void run(const BatchNormArguments<A>& a) {
  if (a.size() * a.cotangents == 0) {
    if (a.sum_x) std::fill_n(a.sum_x, a.size(), A(0));
    if (a.grad_weight) std::fill_n(a.grad_weight, a.channels, A(0));
    return;
  }
  if (a.inner == 1) {
    for (int64_t k = 0; k < a.cotangents; ++k) AcrossChannels<A>(a.of(k)).run();
    return;
  }
  if constexpr (std::is_same_v<A, float>)
    if (a.dtype == ScalarType::BFloat16 && !a.sum_x) return run_along<BFloat16>(a);
  run_along<A>(a);
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_double_backward(std::optional<Tensor> u, std::optional<Tensor> a,
                                                              std::optional<Tensor> b, Tensor grad, Tensor x,
                                                              std::optional<Tensor> weight, Tensor mean, Tensor invstd,
                                                              bool training, bool need_grad, bool need_x,
                                                              bool need_weight) {
  const int64_t cotangents = check_batch_norm("batch_norm_double_backward", u, a, b, grad, x, weight, mean, invstd);
  const auto sizes = sizes_of(x), sizes_of_grad = sizes_of(grad);
  const ScalarType dtype = x.scalar_type(), wide = accumulation_type(dtype);
  const bool several = grad.dim() == 4;
  const Tensor dense_u = u ? torch::stable::contiguous(*u) : torch::stable::new_zeros(x, sizes_of_grad);
  const Tensor g = torch::stable::contiguous(grad), dense_x = torch::stable::contiguous(x);
  const Tensor dense_mean = torch::stable::contiguous(mean), dense_invstd = torch::stable::contiguous(invstd);
  const auto dense_weight = contiguous(weight), dense_a = contiguous(a), dense_b = contiguous(b);
  const auto output = [&](bool needed, const std::vector<int64_t>& shape, ScalarType type) {
    return torch::stable::new_empty(x, needed ? shape : std::vector<int64_t>{0}, type);
  };
  Tensor gg_grad = output(need_grad, sizes_of_grad, dtype), grad_x = output(need_x, sizes, dtype);
  Tensor grad_weight = output(need_weight, {x.size(1)}, wide);
  Tensor sum_x = need_x && several && wide != dtype ? output(true, sizes, wide) : grad_x;  // over the cotangents

  visit_accumulation(dtype, [&]<class A>(A) {
    run(BatchNormArguments<A>{
        .images = x.size(0),
        .channels = x.size(1),
        .inner = x.size(2),
        .dtype = dtype,
        .training = training,
        .cotangents = cotangents,
        .u = pointer<char>(dense_u),
        .g = pointer<char>(g),
        .x = training || a || need_x ? pointer<char>(dense_x) : nullptr,
        .grad = need_grad ? pointer<char>(gg_grad) : nullptr,
        .grad_x = need_x && !several ? pointer<char>(grad_x) : nullptr,
        .sum_x = need_x && several ? pointer<A>(sum_x) : nullptr,
        .weight = pointer<A>(dense_weight),
        .a = pointer<A>(dense_a),
        .b = pointer<A>(dense_b),
        .mean = pointer<A>(dense_mean),
        .invstd = pointer<A>(dense_invstd),
        .grad_weight = need_weight ? pointer<A>(grad_weight) : nullptr,
    });
  });
  if (sum_x.data_ptr() != grad_x.data_ptr()) torch::stable::copy_(grad_x, sum_x);
  return {gg_grad, grad_x, grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(robustkern, CPU, m) {
  m.impl("batch_norm_double_backward", TORCH_BOX(&batch_norm_double_backward));
}

}  // namespace rk::cpu
