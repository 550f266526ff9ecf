// random_cotangents on the CPU.  Formulas and orders of sums: math/random_cotangents.h.  A thread draws one v at a time
// into its workspace, or the frames of one sample, and writes w from there: memory sees the outputs and w.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "../arguments/random_cotangents.h"
#include "pieces.h"
#include "random_cotangents_loops.h"

namespace rk::cpu {
namespace {

constexpr int64_t kFrameColumns = 256;  // of one unit of work; each draws the reflections anew

struct CotangentArguments : CotangentShape {
  PhiloxKey key;
  ScalarType dtype;
  const char *outputs, *grad;  // [B, C, S], [K, B, C, S]
  char* result;                // [K, B, C, S], of a backward [B, C, S]

  CotangentArguments(const CotangentShape& shape, const Tensor& seed, const Tensor& z, const char* g, const Tensor& to)
      : CotangentShape(shape),
        key(static_cast<uint64_t>(*pointer<int64_t>(seed))),
        dtype(z.scalar_type()),
        outputs(pointer<char>(z)),
        grad(g),
        result(pointer<char>(to)) {}

  int64_t item() const { return item_size(dtype); }
  int64_t row(int64_t k, int64_t b) const { return (k * batch + b) * size() * item(); }

  // Numbers of the sequence that a row of v takes up, and rows that are drawn at once.
  int64_t row_numbers() const { return law == Law::kRademacher ? (size() + 31) / 32 * 32 : (size() + 3) / 4 * 4; }
  int64_t rows_together() const {
    return std::clamp<int64_t>(4096 / std::max<int64_t>(row_numbers(), 1), 1, projections);
  }
};

// What draws v in the accumulation type.
template <class A>
struct Draws {
  std::vector<A> v;                              // whole blocks
  std::vector<A> reflections, columns, q, sign;  // [K / 4, <= D, 4]; [D, kColumns]; [D]; [K]
  std::vector<FourReflections<A>> four;          // [K / 4]

  explicit Draws(const CotangentArguments& c) {
    const int64_t n = c.size();
    if (c.law != Law::kOrthonormal) {
      v.resize(c.row_numbers() * c.rows_together());
      return;
    }
    const int64_t fours = (c.projections + 3) / 4;
    v.resize(reflection_begin(c.projections, n) + 3);
    reflections.resize(4 * group_begin(fours, n));
    columns.resize(n * kColumns<A>);
    q.resize(n);
    sign.resize(c.projections);
    four.resize(fours);
  }
};

// What makes w of v, in type R: for fisher double, since h = g - <p, g> loses digits where p is nearly one.
template <class R>
struct Rows {
  std::vector<R> v, a, w, g;  // [D]
  std::vector<R> d, m, b;     // [S]
  std::vector<float> narrow;  // [D], on the way between R and storage
  int64_t sample = -1;        // whose a is there

  explicit Rows(const CotangentArguments& c) {
    const bool fisher = c.kind == Kind::kFisher;
    for (std::vector<R>* each : {&v, &a}) each->resize(fisher ? c.size() : 0);
    w.resize(c.size());
    g.resize(c.grad ? c.size() : 0);
    for (std::vector<R>* each : {&d, &m, &b}) each->resize(c.positions);
    narrow.resize(c.dtype == ScalarType::Double ? 0 : c.size());
  }

  void read(const CotangentArguments& c, const char* from, R* to) {
    if (sizeof(R) == 4 || c.dtype == ScalarType::Double) return read_piece(c.dtype, from, to, c.size());
    read_piece(c.dtype, from, narrow.data(), c.size());
    std::copy_n(narrow.data(), c.size(), to);
  }
  void write(const CotangentArguments& c, const R* from, char* to) {
    if (sizeof(R) == 4 || c.dtype == ScalarType::Double) return write_piece(c.dtype, from, to, c.size());
    std::transform(from, from + c.size(), narrow.data(), [](R x) { return static_cast<float>(x); });
    write_piece(c.dtype, narrow.data(), to, c.size());
  }
};

// a = sqrt(softmax z) of one sample.
template <class R>
void find_roots(const CotangentArguments& c, int64_t sample, Rows<R>& s) {
  if (s.sample == sample || c.size() == 0) return;
  s.sample = sample;
  const int64_t S = c.positions;
  s.read(c, c.outputs + c.row(0, sample), s.w.data());
  const R* const z = s.w.data();
  R *const a = s.a.data(), *const max = s.m.data(), *const log_sum = s.d.data();
  if (S == 1) {
    const R most = largest(z, c.classes);
    return roots(z, most, log_fixed(sum_of_exponentials(z, most, c.classes)), a, c.classes);
  }
  std::copy_n(z, S, max);
  std::fill_n(log_sum, S, R(0));
  for (int64_t e = S; e < c.size(); e += S)
    vector_loop(S, [=](int64_t j) RK_INLINE_LAMBDA { max[j] = z[e + j] > max[j] ? z[e + j] : max[j]; });
  for (int64_t e = 0; e < c.size(); e += S)
    vector_add(S, log_sum, [=](int64_t j) RK_INLINE_LAMBDA { return exp_fixed(z[e + j] - max[j]); });
  vector_loop(S, [=](int64_t j) RK_INLINE_LAMBDA { log_sum[j] = log_fixed(log_sum[j]); });
  for (int64_t e = 0; e < c.size(); e += S) roots(z + e, max, log_sum, a + e, S);
}

// The reflections of one sample.
template <class A>
void draw_reflections(const CotangentArguments& c, int64_t sample, int64_t count, Draws<A>& s) {
  const int64_t n = c.size();
  draw_normal(c.key, static_cast<uint32_t>(sample), 0, (reflection_begin(count, n) + 3) / 4, s.v.data());
  for (int64_t group = 0; 4 * group < count; ++group) {
    FourReflections<A>& h = s.four[group];
    const int64_t rows = n - 4 * group;
    A* const u = s.reflections.data() + 4 * group_begin(group, n);
    for (int64_t j = 0; j < 4; ++j) {
      const int64_t k = 4 * group + j, zeros = k < count ? j : rows;
      for (int64_t i = 0; i < zeros; ++i) u[4 * i + j] = A(0);
      h.factor[j] = A(0);
      if (k >= count) continue;
      const A* const x = s.v.data() + reflection_begin(k, n);
      const Reflection<A> one(x[0], std::sqrt(dot(x, x, n - k)));
      for (int64_t i = j; i < rows; ++i) u[4 * i + j] = x[i - j];
      u[4 * j + j] = one.head;
      h.factor[j] = one.factor;
      s.sign[k] = one.sign * std::sqrt(A(n));
    }
    products(u, rows, h);
  }
}

// f(k, v, scale) for projections [first, last) of one sample: v scaled are orthogonal, of length sqrt(D).
template <class A, class F>
void for_frames(const CotangentArguments& c, int64_t sample, int64_t first, int64_t last, Draws<A>& s, const F& f) {
  constexpr int64_t W = kColumns<A>;
  const int64_t n = c.size();
  draw_reflections(c, sample, last, s);
  for (int64_t begin = first; begin < last; begin += W) {
    const int64_t end = std::min(begin + W, last);
    std::fill(s.columns.begin(), s.columns.end(), A(0));
    for (int64_t k = begin; k < end; ++k) s.columns[k * W + k - begin] = A(1);
    for (int64_t group = (end - 1) / 4; group >= 0; --group)
      reflect(s.reflections.data() + 4 * group_begin(group, n), s.four[group], n - 4 * group,
              s.columns.data() + 4 * group * W);
    for (int64_t k = begin; k < end; ++k) {
      for (int64_t e = 0; e < n; ++e) s.q[e] = s.columns[e * W + k - begin];
      f(k, s.q.data(), s.sign[k]);
    }
  }
}

// f(k, v, scale) for projections [first, last) of one sample.
template <class A, class F>
void for_rows(const CotangentArguments& c, int64_t sample, int64_t first, int64_t last, Draws<A>& s, const F& f) {
  if (c.law == Law::kOrthonormal) return for_frames(c, sample, first, last, s, f);
  const int64_t n = c.size(), numbers = c.row_numbers(), together = c.rows_together();
  const auto number = static_cast<uint32_t>(sample);
  for (int64_t begin = first; begin < last; begin += together) {
    const int64_t end = std::min(begin + together, last);
    if (c.law == Law::kRademacher)
      draw_sign(c.key, number, begin * numbers / 32, (end - begin) * numbers / 32, s.v.data());
    else
      draw_normal(c.key, number, begin * numbers / 4, (end - begin) * numbers / 4, s.v.data());
    for (int64_t k = begin; k < end; ++k) {
      const A* const v = s.v.data() + (k - begin) * numbers;
      f(k, v, c.law == Law::kSphere ? std::sqrt(A(n)) / std::sqrt(dot(v, v, n)) : A(1));
    }
  }
}

// w of one row.
template <class R>
void transform(const CotangentArguments& c, const R* v, R scale, R* w, Rows<R>& s) {
  const int64_t n = c.size(), S = c.positions;
  if (c.kind == Kind::kPlain) return vector_write(n, w, [=](int64_t e) RK_INLINE_LAMBDA { return v[e] * scale; });
  const R* const a = s.a.data();
  R* const d = s.d.data();
  if (S == 1 && c.kind == Kind::kCentred) return centre(v, sum(v, n) / R(n), scale, w, n);
  if (S == 1) return fisher(a, v, dot(a, v, n), scale, w, n);
  std::fill_n(d, S, R(0));
  if (c.kind == Kind::kCentred) {
    for (int64_t e = 0; e < n; e += S) vector_add(S, d, [=](int64_t j) RK_INLINE_LAMBDA { return v[e + j]; });
    vector_loop(S, [=, classes = R(c.classes)](int64_t j) RK_INLINE_LAMBDA { d[j] /= classes; });
    for (int64_t e = 0; e < n; e += S) centre(v + e, d, scale, w + e, S);
  } else {
    for (int64_t e = 0; e < n; e += S) add_dot(a + e, v + e, d, S);
    for (int64_t e = 0; e < n; e += S) fisher(a + e, v + e, d, scale, w + e, S);
  }
}

// g - g_0 of one row.
template <class R>
void read_grad(const CotangentArguments& c, int64_t k, int64_t sample, Rows<R>& s) {
  const int64_t S = c.positions;
  s.read(c, c.grad + c.row(k, sample), s.g.data());
  if (S == 1) return subtract(s.g.data(), s.g[0], c.size());
  std::copy_n(s.g.data(), S, s.b.data());
  for (int64_t e = 0; e < c.size(); e += S) subtract(s.g.data() + e, s.b.data(), S);
}

// Adds a projection's share of grad_z to w.
template <class R>
void add_gradient(const CotangentArguments& c, const R* v, R scale, const R* g, Rows<R>& s) {
  const int64_t n = c.size(), S = c.positions;
  const R* const a = s.a.data();
  R *const w = s.w.data(), *const d = s.d.data(), *const m = s.m.data(), *const b = s.b.data();
  if (S == 1) return add_slopes(a, v, g, dot(a, v, n), dot(g, a, v, n), dot(g, a, a, n), scale, w, n);
  for (R* each : {d, m, b}) std::fill_n(each, S, R(0));
  for (int64_t e = 0; e < n; e += S) {
    add_dot(a + e, v + e, d, S);
    add_dot(g + e, a + e, v + e, m, S);
    add_dot(g + e, a + e, a + e, b, S);
  }
  for (int64_t e = 0; e < n; e += S) add_slopes(a + e, v + e, g + e, d, m, b, scale, w + e, S);
}

// Units of work that are worth a thread of their own.
int64_t units_per_thread(const CotangentArguments& c) {
  const int64_t together = c.law == Law::kOrthonormal ? c.projections / 8 + 1 : 1;
  return rows_per_thread(8 * c.size() * std::min(c.projections, kFrameColumns) * together);
}

// v in the type of the rows.
template <class A, class R>
const R* widened(const CotangentArguments& c, const A* v, Rows<R>& s) {
  if constexpr (std::is_same_v<A, R>) return v;
  std::copy_n(v, c.size(), s.v.data());
  return s.v.data();
}

template <class A, class R>
void write_row(const CotangentArguments& c, int64_t k, int64_t sample, const A* v, A scale, Rows<R>& s) {
  if (c.kind == Kind::kFisher) find_roots(c, sample, s);
  char* const to = c.result + c.row(k, sample);
  const bool direct = c.item() == sizeof(R);
  R* const w = direct ? reinterpret_cast<R*>(to) : s.w.data();
  transform(c, widened(c, v, s), R(scale), w, s);
  if (!direct) s.write(c, w, to);
}

// Frames of few dimensions, several samples at a time.
template <class A, class R>
void run_small_frames(const CotangentArguments& c) {
  constexpr int64_t L = SmallFrames<A>::L;
  const int64_t n = c.size(), K = c.projections;
  torch::stable::parallel_for(0, (c.batch + L - 1) / L, units_per_thread(c) / L + 1, [&](int64_t begin, int64_t end) {
    SmallFrames<A> frames;
    Rows<R> s(c);
    A several[kFewDimensions * L * kFewDimensions];
    for (int64_t first = begin * L; first < std::min(end * L, c.batch); first += L) {
      const int64_t count = std::min(L, c.batch - first);
      draw_side_by_side(c.key, static_cast<uint32_t>(first), (reflection_begin(K, n) + 3) / 4, frames);
      find_reflections(K, n, frames);
      turn_columns(K, n, frames);
      if (c.kind == Kind::kPlain && c.item() == sizeof(A)) {
        for (int64_t k = 0; k < K; ++k)
          copy_rows(frames, frames.sign[k], k, K, n, count, reinterpret_cast<A*>(c.result + c.row(k, first)));
        continue;
      }
      for (int64_t k = 0; k < K; ++k) copy_rows<A>(frames, nullptr, k, K, n, count, several + k * L * n);
      for (int64_t l = 0; l < count; ++l)
        for (int64_t k = 0; k < K; ++k)
          write_row<A, R>(c, k, first + l, several + (k * L + l) * n, frames.sign[k][l], s);
    }
  });
}

template <class A, class R>
void run(const CotangentArguments& c) {
  if (c.law == Law::kOrthonormal && c.size() <= kFewDimensions && c.batch > 1) return run_small_frames<A, R>(c);
  const int64_t together = c.law == Law::kOrthonormal ? kFrameColumns : c.rows_together();
  const int64_t units = (c.projections + together - 1) / together;
  torch::stable::parallel_for(0, c.batch * units, units_per_thread(c), [&](int64_t begin, int64_t end) {
    Draws<A> draws(c);
    Rows<R> s(c);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t sample = unit / units, first = unit % units * together;
      for_rows(c, sample, first, std::min(first + together, c.projections), draws,
               [&](int64_t k, const A* v, A scale) { write_row<A, R>(c, k, sample, v, scale, s); });
    }
  });
}

template <class A>
void run_backward(const CotangentArguments& c) {
  torch::stable::parallel_for(0, c.batch, units_per_thread(c), [&](int64_t begin, int64_t end) {
    Draws<A> draws(c);
    Rows<double> s(c);
    for (int64_t sample = begin; sample < end; ++sample) {
      if (c.size() == 0) continue;
      find_roots(c, sample, s);
      std::fill(s.w.begin(), s.w.end(), 0.0);
      for_rows(c, sample, 0, c.projections, draws, [&](int64_t k, const A* v, A scale) {
        read_grad(c, k, sample, s);
        add_gradient(c, widened(c, v, s), double(scale), s.g.data(), s);
      });
      s.write(c, s.w.data(), c.result + c.row(0, sample));
    }
  });
}

Tensor random_cotangents(Tensor outputs, Tensor seed, int64_t projections, int64_t law, int64_t kind) {
  const CotangentShape shape("random_cotangents", outputs, seed, projections, law, kind);
  Tensor w = torch::stable::new_empty(outputs, shape.of_cotangents());
  const Tensor z = shape.kind == Kind::kFisher ? torch::stable::contiguous(outputs) : outputs;
  const CotangentArguments call(shape, seed, z, nullptr, w);
  if (outputs.scalar_type() == ScalarType::Double)
    run<double, double>(call);
  else
    shape.kind == Kind::kFisher ? run<float, double>(call) : run<float, float>(call);
  return w;
}

Tensor random_cotangents_backward(Tensor grad, Tensor outputs, Tensor seed, int64_t law) {
  constexpr const char* op = "random_cotangents_backward";
  constexpr auto fisher = static_cast<int64_t>(Kind::kFisher);
  const CotangentShape shape(op, outputs, seed, projections_of(op, grad), law, fisher);
  check_grad(op, grad, shape, outputs);
  const Tensor g = torch::stable::contiguous(grad), z = torch::stable::contiguous(outputs);
  Tensor grad_outputs = torch::stable::new_empty(outputs, shape.of_outputs);
  const CotangentArguments call(shape, seed, z, pointer<char>(g), grad_outputs);
  visit_accumulation(outputs.scalar_type(), [&]<class A>(A) { run_backward<A>(call); });
  return grad_outputs;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(robustkern, CPU, m) {
  m.impl("random_cotangents", TORCH_BOX(&random_cotangents));
  m.impl("random_cotangents_backward", TORCH_BOX(&random_cotangents_backward));
}

}  // namespace rk::cpu
