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

#include "../group_norm_arguments.h"
#include "../math/group_norm.h"
#include "norm_sums.h"
#include "pieces.h"

namespace rk::cpu {
namespace {

// Planes: `count` channels of `length` positions each, `stride` apart.  Rows: `count` positions of `length` channels.
template <class A>
struct GroupNormPiece {
  const A *x, *g, *u;
  int64_t count, length, stride;
};

// The coefficients of every channel of a sample, as arrays: of ChannelSlopes or ChannelBends.
template <class A>
struct GroupNormCoefficients {
  const A *mean, *r;
  const A *t_u, *t_x, *t_one, *x_u, *x_g, *x_x, *x_one;

  GroupNormCoefficients from(int64_t c) const {
    const auto at = [c](const A* p) { return p ? p + c : nullptr; };
    return {mean + c, r + c, at(t_u), at(t_x), at(t_one), at(x_u), at(x_g), at(x_x), at(x_one)};
  }
};

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

template <class A>
RK_MULTIVERSION void plane_gg_grad(const GroupNormPiece<A>& p, const GroupNormCoefficients<A>& k, A* __restrict__ out) {
  for (int64_t c = 0; c < p.count; ++c, out += p.stride) {
    const A *x = p.x + c * p.stride, *u = p.u + c * p.stride;
    const A mean = k.mean[c], r = k.r[c], t_u = k.t_u[c], t_x = k.t_x[c], t_one = k.t_one[c];
    for (int64_t j = 0; j < p.length; ++j) out[j] = t_u * u[j] + (t_x * ((x[j] - mean) * r) + t_one);
  }
}

template <class A>
RK_MULTIVERSION void plane_grad_x(const GroupNormPiece<A>& p, const GroupNormCoefficients<A>& k, A* __restrict__ out) {
  for (int64_t c = 0; c < p.count; ++c, out += p.stride) {
    const A *x = p.x + c * p.stride, *g = p.g + c * p.stride;
    const A mean = k.mean[c], r = k.r[c], x_g = k.x_g[c], x_x = k.x_x[c], x_one = k.x_one[c];
    if (p.u) {
      const A *u = p.u + c * p.stride, x_u = k.x_u[c];
      for (int64_t j = 0; j < p.length; ++j) out[j] = x_u * u[j] + (x_g * g[j] + (x_x * ((x[j] - mean) * r) + x_one));
    } else {
      for (int64_t j = 0; j < p.length; ++j) out[j] = x_g * g[j] + (x_x * ((x[j] - mean) * r) + x_one);
    }
  }
}

// sums: five arrays of p.length
template <class A>
RK_MULTIVERSION void row_sums(const GroupNormPiece<A>& p, const A* mean, const A* r, A* sums) {
  if (p.u)
    column_sums<true>(p.count, p.length, p.stride, p.x, p.g, p.u, mean, r, sums);
  else
    column_sums<false, A>(p.count, p.length, p.stride, p.x, p.g, nullptr, mean, r, sums);
}

template <class A>
RK_MULTIVERSION void row_gg_grad(const GroupNormPiece<A>& p, const GroupNormCoefficients<A>& k, A* __restrict__ out) {
  for (int64_t i = 0; i < p.count; ++i, out += p.stride) {
    const A *x = p.x + i * p.stride, *u = p.u + i * p.stride;
    for (int64_t j = 0; j < p.length; ++j)
      out[j] = k.t_u[j] * u[j] + (k.t_x[j] * ((x[j] - k.mean[j]) * k.r[j]) + k.t_one[j]);
  }
}

template <class A>
RK_MULTIVERSION void row_grad_x(const GroupNormPiece<A>& p, const GroupNormCoefficients<A>& k, A* __restrict__ out) {
  for (int64_t i = 0; i < p.count; ++i, out += p.stride) {
    const A *x = p.x + i * p.stride, *g = p.g + i * p.stride;
    if (p.u) {
      const A* u = p.u + i * p.stride;
      for (int64_t j = 0; j < p.length; ++j)
        out[j] = k.x_u[j] * u[j] + (k.x_g[j] * g[j] + (k.x_x[j] * ((x[j] - k.mean[j]) * k.r[j]) + k.x_one[j]));
    } else {
      for (int64_t j = 0; j < p.length; ++j)
        out[j] = k.x_g[j] * g[j] + (k.x_x[j] * ((x[j] - k.mean[j]) * k.r[j]) + k.x_one[j]);
    }
  }
}

constexpr int64_t kSums = 5;              // of ChannelSums
constexpr int64_t kArrays = 9;            // of GroupNormCoefficients
constexpr int64_t kPartElements = 65536;  // of channels innermost: with the results, inside a core's L2 cache
constexpr int64_t kRunningRows = 32;      // that are added in the accumulation type, before double takes over

struct GroupNormArguments {
  ScalarType dtype;
  int64_t item;  // bytes of a stored element
  bool innermost, second, streamed;
  int64_t samples, channels, positions, groups;
  const void *x, *g, *u;                                 // [N, C, S] in one layout; u: second derivative only
  const void *weight, *gg_weight, *gg_bias;              // [C], accumulation type, or null
  const void *mean, *rstd;                               // [N, groups], accumulation type
  void *gg_grad, *grad_x, *sample_weight, *sample_bias;  // outputs or null; the last two [N, C], accumulation type

  // Of a unit; `part_size` channels or positions make a part.
  int64_t units, unit_groups, unit_channels, parts, part_size;

  int64_t group_channels() const { return channels / groups; }
  int64_t sums_size() const { return kSums * unit_channels * (innermost ? parts : 1); }
};

// Pieces of the three inputs in the accumulation type, and room for a piece of an output.
template <class A>
class Pieces {
 public:
  explicit Pieces(const GroupNormArguments& a) : a_(a), direct_(a.item == sizeof(A)) {}

  // `count` runs of `length` elements, a run `stride` behind the last in memory.  Converted runs are adjacent.
  GroupNormPiece<A> read(int64_t offset, int64_t count, int64_t length, int64_t stride) {
    if (direct_) return {at(a_.x, offset), at(a_.g, offset), a_.u ? at(a_.u, offset) : nullptr, count, length, stride};
    convert(a_.x, offset, count * length, x_);
    convert(a_.g, offset, count * length, g_);
    if (a_.u) convert(a_.u, offset, count * length, u_);
    return {x_, g_, a_.u ? u_ : nullptr, count, length, length};
  }

  template <class F>
  void write(void* out, int64_t offset, int64_t n, const F& f) {
    char* to = static_cast<char*>(out) + offset * a_.item;
    if (direct_ && !a_.streamed) return f(reinterpret_cast<A*>(to));
    f(out_);
    direct_ ? stream_piece(out_, to, n * a_.item) : write_piece(a_.dtype, out_, to, n);
  }

 private:
  static const A* at(const void* base, int64_t offset) { return static_cast<const A*>(base) + offset; }
  void convert(const void* base, int64_t offset, int64_t n, A* to) {
    read_piece(a_.dtype, static_cast<const char*>(base) + offset * a_.item, to, n);
  }

  const GroupNormArguments& a_;
  bool direct_;
  alignas(64) A x_[kPiece], g_[kPiece], u_[kPiece], out_[kPiece];
};

// What one unit's passes leave for each other.
template <class A>
class Unit {
 public:
  Unit(const GroupNormArguments& a, int64_t index, double* sums, A* arrays)
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
      array(0)[c] = static_cast<const A*>(a_.mean)[row];
      array(1)[c] = static_cast<const A*>(a_.rstd)[row];
    }
  }

  void sum_part(int64_t part, Pieces<A>& pieces) {
    if (a_.innermost)
      sum_rows(part, pieces);
    else
      for_planes(part, [&](int64_t c, int64_t count, int64_t offset, int64_t length) {
        plane_sums(pieces.read(offset, count, length, a_.positions), array(0) + c, array(1) + c, sums_ + kSums * c);
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
      for (int64_t c = begin; c < end; ++c) channel_sums(c).add_to(s, weight(c), vector(a_.gg_weight, c));
      const NormSlopes<double> slopes = norm_slopes(s.g, s.gx, r, count);
      const NormBends<double> bends = norm_bends(s, r, count);
      for (int64_t c = begin; c < end; ++c) a_.second ? set_bends(c, bends, r) : set_slopes(c, slopes);
    }
  }

  void write_part(int64_t part, Pieces<A>& pieces) {
    if (!a_.gg_grad && !a_.grad_x) return;
    const auto write = [&](const GroupNormPiece<A>& p, int64_t c, int64_t offset) {
      const GroupNormCoefficients<A> k = coefficients().from(c);
      const int64_t n = p.count * p.length;
      if (a_.gg_grad)
        pieces.write(a_.gg_grad, offset, n,
                     [&](A* out) { a_.innermost ? row_gg_grad(p, k, out) : plane_gg_grad(p, k, out); });
      if (a_.grad_x)
        pieces.write(a_.grad_x, offset, n,
                     [&](A* out) { a_.innermost ? row_grad_x(p, k, out) : plane_grad_x(p, k, out); });
    };
    if (a_.innermost)
      for_rows(part, [&](int64_t c, int64_t width, int64_t offset, int64_t count) {
        write(pieces.read(offset, count, width, a_.channels), c, offset);
      });
    else
      for_planes(part, [&](int64_t c, int64_t count, int64_t offset, int64_t length) {
        write(pieces.read(offset, count, length, a_.positions), c, offset);
      });
  }

 private:
  A* array(int64_t i) const { return arrays_ + i * a_.unit_channels; }
  double vector(const void* v, int64_t c) const { return v ? double(static_cast<const A*>(v)[first_channel_ + c]) : 0; }
  double weight(int64_t c) const { return a_.weight ? vector(a_.weight, c) : 1; }

  ChannelSums<double> channel_sums(int64_t c) const {
    const double* s = a_.innermost ? sums_ + c : sums_ + kSums * c;
    const int64_t step = a_.innermost ? a_.unit_channels : 1;
    return {s[0], s[step], s[2 * step], s[3 * step], s[4 * step]};
  }
  GroupNormCoefficients<A> coefficients() const {
    return {array(0), array(1), array(2), array(3), array(4), array(5), array(6), array(7), array(8)};
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
    const ChannelBends<double> k = channel_bends(group, r, weight(c), vector(a_.gg_weight, c), vector(a_.gg_bias, c));
    const double values[] = {k.t_u, k.t_x, k.t_one, k.x_u, k.x_g, k.x_x, k.x_one};
    for (int i = 0; i < 7; ++i) array(2 + i)[c] = A(values[i]);
    put(a_.sample_weight, c, channel_sums(c).weight_bend(group, r));
  }
  void put(void* out, int64_t c, double value) const {
    if (out) static_cast<A*>(out)[sample_ * a_.channels + first_channel_ + c] = A(value);
  }

  // f(channel of the unit, channels, offset, positions): whole planes, or a stretch of one.
  template <class F>
  void for_planes(int64_t part, const F& f) {
    const int64_t begin = part * a_.part_size, count = std::min(a_.unit_channels - begin, a_.part_size);
    const int64_t offset = (sample_ * a_.channels + first_channel_ + begin) * a_.positions;
    if (a_.positions <= kPiece) return f(begin, count, offset, a_.positions);
    for (int64_t j = 0; j < a_.positions; j += kPiece) f(begin, count, offset + j, std::min(a_.positions - j, kPiece));
  }

  // f(first channel, channels, offset, positions): a piece is all channels of some positions, or some of one.
  template <class F>
  void for_rows(int64_t part, const F& f) {
    const int64_t begin = part * a_.part_size, end = std::min(a_.positions, begin + a_.part_size);
    for (int64_t c = 0; c < a_.channels; c += kPiece) {
      const int64_t width = std::min(a_.channels - c, kPiece);
      const int64_t rows = width == a_.channels ? std::min(kPiece / width, kRunningRows) : 1;
      for (int64_t j = begin; j < end; j += rows)
        f(c, width, (sample_ * a_.positions + j) * a_.channels + c, std::min(rows, end - j));
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
    for_rows(part, [&](int64_t c, int64_t w, int64_t offset, int64_t count) {
      if (rows && (c != channel || rows + count > kRunningRows)) flush();
      if (!rows) std::fill_n(running, kSums * w, A(0));
      channel = c;
      width = w;
      row_sums(pieces.read(offset, count, w, a_.channels), array(0) + c, array(1) + c, running);
      rows += count;
    });
    flush();
  }

  const GroupNormArguments& a_;
  int64_t sample_, first_group_, first_channel_;
  double* sums_;
  A* arrays_;
};

template <class A>
void run_as(const GroupNormArguments& a) {
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

// The tensors of one call, in the form that the units read.
class GroupNormTensors {
 public:
  GroupNormArguments a{};

  GroupNormTensors(const Tensor& x, const Tensor& grad, const Tensor& mean, const Tensor& rstd,
                   const std::optional<Tensor>& weight, int64_t groups, bool second) {
    a.innermost = channels_innermost(x);
    a.second = second;
    a.dtype = x.scalar_type();
    a.item = item_size(a.dtype);
    a.samples = x.size(0);
    a.channels = x.size(1);
    a.positions = x.size(2);
    a.streamed = x.numel() * a.item >= kStreamedBytes;
    a.groups = groups;
    a.x = keep(dense_in(a.innermost, x));
    a.g = keep(dense_in(a.innermost, grad));
    a.mean = vector(mean);
    a.rstd = vector(rstd);
    a.weight = vector(weight);
    x_ = kept_.front();
    // Planes of one position are rows of channels.
    a.innermost = a.innermost || a.positions == 1;
    if (a.innermost) {
      a.units = a.samples;
      a.unit_groups = a.groups;
      a.part_size = std::max<int64_t>(1, kPartElements / std::max<int64_t>(1, a.channels));
      a.parts = (a.positions + a.part_size - 1) / a.part_size;
    } else {
      a.units = a.samples * a.groups;
      a.unit_groups = 1;
      a.part_size = std::max<int64_t>(1, kPiece / std::max<int64_t>(1, a.positions));
      a.parts = (a.group_channels() + a.part_size - 1) / a.part_size;
    }
    a.unit_channels = a.unit_groups * a.group_channels();
  }

  const void* keep(const Tensor& t) {
    kept_.push_back(t);
    return t.data_ptr();
  }
  const void* vector(const std::optional<Tensor>& t) { return t ? keep(torch::stable::contiguous(*t)) : nullptr; }

  const void* dense(const std::optional<Tensor>& t) {
    if (t) return keep(dense_in(channels_innermost(*x_), *t));
    Tensor zeros = empty_in(channels_innermost(*x_), *x_);
    return keep(torch::stable::zero_(zeros));
  }

  Tensor like_x(bool needed, void*& data) {
    Tensor out = needed ? empty_in(channels_innermost(*x_), *x_) : torch::stable::new_empty(*x_, {0});
    data = needed ? out.data_ptr() : nullptr;
    return out;
  }

  void make_samples(bool needed, void*& data) {
    if (!needed) return;
    kept_.push_back(torch::stable::new_empty(*x_, {a.samples, a.channels}, accumulation_type(a.dtype)));
    data = kept_.back().data_ptr();
  }

  void run() {
    visit_accumulation(a.dtype, [&]<class A>(A) { run_as<A>(a); });
  }

  Tensor total(bool needed, const void* samples) {
    Tensor out = torch::stable::new_empty(*x_, {needed ? a.channels : 0}, accumulation_type(a.dtype));
    if (!needed) return out;
    visit_accumulation(a.dtype, [&]<class A>(A) {
      add_rows_in_double(a.samples, a.channels, static_cast<const A*>(samples), pointer<A>(out));
    });
    return out;
  }

 private:
  std::optional<Tensor> x_;
  std::vector<Tensor> kept_;
};

std::tuple<Tensor, Tensor, Tensor> group_norm_backward(Tensor grad, Tensor x, std::optional<Tensor> weight, Tensor mean,
                                                       Tensor rstd, int64_t groups, bool need_x, bool need_weight,
                                                       bool need_bias) {
  const std::optional<Tensor> none;
  check_group_norm("group_norm_backward", none, none, none, grad, x, weight, mean, rstd, groups);
  GroupNormTensors t(x, grad, mean, rstd, weight, groups, false);
  Tensor grad_x = t.like_x(need_x, t.a.grad_x);
  t.make_samples(need_weight, t.a.sample_weight);
  t.make_samples(need_bias, t.a.sample_bias);
  t.run();
  return {grad_x, t.total(need_weight, t.a.sample_weight), t.total(need_bias, t.a.sample_bias)};
}

std::tuple<Tensor, Tensor, Tensor> group_norm_double_backward(std::optional<Tensor> gg_x,
                                                              std::optional<Tensor> gg_weight,
                                                              std::optional<Tensor> gg_bias, Tensor grad, Tensor x,
                                                              std::optional<Tensor> weight, Tensor mean, Tensor rstd,
                                                              int64_t groups, bool need_grad, bool need_x,
                                                              bool need_weight) {
  check_group_norm("group_norm_double_backward", gg_x, gg_weight, gg_bias, grad, x, weight, mean, rstd, groups);
  GroupNormTensors t(x, grad, mean, rstd, weight, groups, true);
  t.a.u = t.dense(gg_x);
  t.a.gg_weight = t.vector(gg_weight);
  t.a.gg_bias = t.vector(gg_bias);
  Tensor gg_grad = t.like_x(need_grad, t.a.gg_grad), grad_x = t.like_x(need_x, t.a.grad_x);
  t.make_samples(need_weight, t.a.sample_weight);
  t.run();
  return {gg_grad, grad_x, t.total(need_weight, t.a.sample_weight)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(robustkern, CPU, m) {
  m.impl("group_norm_backward", TORCH_BOX(&group_norm_backward));
  m.impl("group_norm_double_backward", TORCH_BOX(&group_norm_double_backward));
}

}  // namespace rk::cpu
