// grad_x[c, oh s - p + kh, ow s - p + kw] += sum_o w[o, c, kh, kw] g[o, oh, ow]: a matrix product for each image, of the
// weight's [C KH KW, O] and g's [O, OH OW], of which each row is added to the image at a shifted place.
//
// Rows and columns of the image are taken apart by their remainder modulo the stride ("phases"), so that what is shifted is
// adjacent; and every row of g gets as many zeros behind it as shifts go beyond its end, so that all of g's rows are one long
// row.  Then the product's sums go from registers to the image at once.  At the end phases are interleaved: a transposition.
#include "input_gradient_cpu.h"

#include <torch/csrc/stable/ops.h>  // a parallel_for of the library's own: at::'s is one thread without -fopenmp

#include <algorithm>
#include <memory>
#include <vector>

#include "../../cpu/elements.h"
#include "../../cpu/shifted_products.h"
#include "../../cpu/transpose.h"

namespace rk::aten {
namespace {

using namespace rk::cpu;
using at::Tensor;

constexpr int64_t kBlockBytes = 192 << 10;  // of g, widened and turned: stays in a core's second-level cache
constexpr int64_t kBandShifts = 16;         // rows of a band for each row that two bands both compute
constexpr int64_t kBandBytes = 512 << 10;   // of the image in a band, where none is computed twice

int64_t floor_divide(int64_t a, int64_t b) { return (a >= 0 ? a : a - b + 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// Kernel entry t adds output i to input (i + shift) stride + phase.
struct Taps {
  explicit Taps(const ConvolutionAxis& a)
      : stride(a.stride),
        padding(a.padding),
        out(a.out),
        phase_size((a.in + a.stride - 1) / a.stride),
        least(floor_divide(-a.padding, a.stride)),
        most(floor_divide(a.kernel - 1 - a.padding, a.stride)) {}
  int64_t shift(int64_t t) const { return floor_divide(t - padding, stride); }
  int64_t phase(int64_t t) const { return t - padding - shift(t) * stride; }
  int64_t stride, padding, out, phase_size, least, most;
};

template <class A>
struct Memory {
  explicit Memory(int64_t n) : at(static_cast<A*>(::operator new(n * sizeof(A), std::align_val_t{64}))) {}
  ~Memory() { ::operator delete(at, std::align_val_t{64}); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  A* const at;
};

// to[j * R + r] = from[r * stride + j].
template <class A>
RK_MULTIVERSION static void interleave(const A* from, int64_t stride, int64_t rows, int64_t n, A* __restrict__ to) {
  if (rows == 2)
    for (int64_t j = 0; j < n; ++j) {
      to[2 * j] = from[j];
      to[2 * j + 1] = from[stride + j];
    }
  else if (rows == 3)
    for (int64_t j = 0; j < n; ++j) {
      to[3 * j] = from[j];
      to[3 * j + 1] = from[stride + j];
      to[3 * j + 2] = from[2 * stride + j];
    }
  else
    transpose_matrix(from, stride, rows, n, to, rows);
}

// One image after the other, in bands of rows.
template <class S>
class InputGradient {
  using A = accumulation_t<S>;

 public:
  InputGradient(const Tensor& g, const Tensor& w, const ConvolutionAxis& height, const ConvolutionAxis& width,
                bool channels_last, Tensor& result)
      : rows_(height),
        columns_(width),
        images_(g.size(0)),
        outs_(g.size(1)),
        channels_(w.size(1)),
        in_rows_(height.in),
        in_columns_(width.in),
        phases_(height.stride * width.stride * channels_),
        pitch_(std::max(columns_.phase_size, columns_.out + columns_.most) - columns_.least),
        from_innermost_(!g.is_contiguous()),
        to_innermost_(channels_last),
        from_(static_cast<const S*>(g.const_data_ptr())),
        end_(from_ + g.numel()),
        to_(static_cast<S*>(result.mutable_data_ptr())) {
    pack(w, height, width);
    const int64_t overlap = rows_.most - rows_.least, row_bytes = pitch_ * phases_ * int64_t(sizeof(A));
    const int64_t band = overlap ? kBandShifts * overlap : std::max<int64_t>(1, kBandBytes / row_bytes);
    bands_ = std::max<int64_t>(1, rows_.phase_size / band);
    block_rows_ = std::clamp<int64_t>(kBlockBytes / (outs_ * pitch_ * int64_t(sizeof(A))), 1, rows_.out);
    // A multiple of a page would put all rows of a block into the same few lines of the cache.
    block_stride_ = round_up(block_rows_ * pitch_, kernels_.lanes);
    if (block_stride_ * sizeof(A) % 1024 == 0) block_stride_ += 64 / sizeof(A);
    const int64_t band_rows = (rows_.phase_size + bands_ - 1) / bands_ + 2 * overlap + 1;
    plane_ = band_rows * pitch_ + kernels_.lanes;
    for (size_t tap = 0; tap < planes_.size(); ++tap) places_.push_back(planes_[tap] * plane_ + shifts_[tap]);
  }

  void run() const {
    const int64_t products = outs_ * int64_t(places_.size()) * rows_.out * columns_.out / bands_;
    const int64_t grain = std::max<int64_t>(1, (1 << 20) / std::max<int64_t>(1, products));
    torch::stable::parallel_for(0, images_ * bands_, grain, [&](int64_t begin, int64_t end) {
      const Memory<A> planes(phases_ * plane_), block(outs_ * block_stride_ + kCopied);
      const Memory<A> line(round_up(in_columns_, rows_.stride * columns_.stride) * channels_ + 64);
      for (int64_t unit = begin; unit < end; ++unit)
        run_band(unit / bands_, unit % bands_, planes.at, block.at, line.at);
    });
  }

 private:
  static constexpr int64_t kCopied = 64 / sizeof(A);  // elements copied at once, of which the last may be too many

  // Rows of the weight's matrix in groups that the kernel adds at once: [group][O][rows of the group].
  void pack(const Tensor& w, const ConvolutionAxis& height, const ConvolutionAxis& width) {
    const int64_t taps = channels_ * height.kernel * width.kernel;
    const int64_t groups = (taps + kernels_.most - 1) / kernels_.most;
    for (int64_t i = 0; i <= groups; ++i) groups_.push_back(taps * i / groups);
    for (int64_t c = 0; c < channels_; ++c)
      for (int64_t kh = 0; kh < height.kernel; ++kh)
        for (int64_t kw = 0; kw < width.kernel; ++kw) {
          planes_.push_back((rows_.phase(kh) * columns_.stride + columns_.phase(kw)) * channels_ + c);
          shifts_.push_back(rows_.shift(kh) * pitch_ + columns_.shift(kw) - columns_.least);
        }
    weights_.resize(taps * outs_);
    const S* const from = static_cast<const S*>(w.const_data_ptr());
    A* to = weights_.data();
    for (int64_t i = 0; i < groups; ++i)
      for (int64_t o = 0; o < outs_; ++o)
        for (int64_t tap = groups_[i]; tap < groups_[i + 1]; ++tap) *to++ = load(from[o * taps + tap]);
  }

  void run_band(int64_t image, int64_t band, A* planes, A* block, A* line) const {
    const int64_t begin = rows_.phase_size * band / bands_, end = rows_.phase_size * (band + 1) / bands_;
    const int64_t first = std::clamp<int64_t>(begin - rows_.most, 0, rows_.out);
    const int64_t last = std::clamp<int64_t>(end - rows_.least, first, rows_.out);
    const int64_t origin = std::min(begin, first + rows_.least);  // the phases' row at the beginning of the planes
    std::fill_n(planes, phases_ * plane_, A(0));
    for (int64_t row = first; row < last; row += block_rows_) {
      const int64_t count = std::min(block_rows_, last - row);
      fill(image, row, count, block);
      const int64_t n = round_up(count * pitch_, kernels_.lanes);
      const bool ends = row + count == last;
      Ahead ahead = behind(ends ? image + (band + 1) / bands_ : image, ends ? last % rows_.out : row + count);
      for (size_t i = 0; i + 1 < groups_.size(); ++i) {
        const int64_t tap = groups_[i], size = groups_[i + 1] - tap;
        kernels_.of[size - 1](outs_, weights_.data() + tap * outs_, block, block_stride_, n, places_.data() + tap,
                              planes + (row - origin) * pitch_, ahead);
        ahead = {reinterpret_cast<const char*>(weights_.data()), 0, 0};  // once is enough
      }
    }
    const int64_t bottom = std::min(in_rows_, end * rows_.stride);
    for (int64_t row = begin * rows_.stride; row < bottom; ++row)
      write(image, row, planes + (row / rows_.stride - origin) * pitch_ - columns_.least, line);
  }

  // The rows of g from here on, in the order in which they are read.
  Ahead behind(int64_t image, int64_t row) const {
    const int64_t wide = 2 * kernels_.lanes * int64_t(sizeof(S));
    const S* const from = from_ + (image * outs_ * rows_.out + row * (from_innermost_ ? outs_ : 1)) * columns_.out;
    const char* const at = reinterpret_cast<const char*>(from);
    if (from_innermost_) return {at, wide, wide * outs_};
    return {at, rows_.out * columns_.out * int64_t(sizeof(S)), wide};
  }

  // Rows of g, as [O][rows][pitch].
  void fill(int64_t image, int64_t row, int64_t count, A* block) const {
    const int64_t n = columns_.out, all = round_up(count * pitch_, kernels_.lanes);
    const S* const first = from_ + image * outs_ * rows_.out * n;
    if (from_innermost_)
      for (int64_t i = 0; i < count; ++i) turn(first + (row + i) * n * outs_, n, block + i * pitch_);
    for (int64_t o = 0; o < outs_; ++o) {
      A* const to = block + o * block_stride_;
      if (!from_innermost_) {
        const S* const from = first + (o * rows_.out + row) * n;
        copy_rows(from, count, n, pitch_, from + count * n + kCopied <= end_, to);
      }
      for (int64_t j = n; j < pitch_; ++j)
        for (int64_t i = 0; i < count; ++i) to[i * pitch_ + j] = A(0);
      for (int64_t j = count * pitch_; j < all; ++j) to[j] = A(0);
    }
  }

  // In pieces of one size, from the last of each row to the first: what a piece has too many, others overwrite.
  RK_MULTIVERSION static void copy_rows(const S* __restrict__ from, int64_t count, int64_t n, int64_t pitch,
                                        bool in_pieces, A* __restrict__ to) {
    if (in_pieces)
      for (int64_t j = (n - 1) / kCopied * kCopied; j >= 0; j -= kCopied)
        for (int64_t i = 0; i < count; ++i) {
          A piece[kCopied];
          for (int64_t k = 0; k < kCopied; ++k) piece[k] = load(from[i * n + j + k]);
          std::memcpy(to + i * pitch + j, piece, sizeof piece);
        }
    else
      for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j < n; ++j) to[i * pitch + j] = load(from[i * n + j]);
  }

  void turn(const S* from, int64_t n, A* to) const {
    if constexpr (std::is_same_v<A, S>)
      transpose(from, outs_, to, block_stride_, n, outs_);
    else
      for (int64_t j = 0; j < n; ++j)
        for (int64_t o = 0; o < outs_; ++o) to[o * block_stride_ + j] = load(from[j * outs_ + o]);
  }

  // A row of the image from its phases.
  void write(int64_t image, int64_t row, const A* planes, A* line) const {
    const A* const from = planes + row % rows_.stride * columns_.stride * channels_ * plane_;
    if (to_innermost_)
      return write_line(from, plane_, columns_.stride * channels_, in_columns_ * channels_, line,
                        to_ + (image * in_rows_ + row) * in_columns_ * channels_);
    for (int64_t c = 0; c < channels_; ++c)
      write_line(from + c * plane_, channels_ * plane_, columns_.stride, in_columns_, line,
                 to_ + ((image * channels_ + c) * in_rows_ + row) * in_columns_);
  }
  void write_line(const A* from, int64_t stride, int64_t rows, int64_t size, A* line, S* to) const {
    if (rows > 1) {
      if (rows % kLanes<A> == 0)
        transpose(from, stride, line, rows, rows, columns_.phase_size);
      else
        interleave(from, stride, rows, columns_.phase_size, line);
      from = line;
    }
    if constexpr (std::is_same_v<A, S>)
      std::copy_n(from, size, to);
    else
      narrow_all(from, to, size);
  }

  const ShiftedProductKernels<A>& kernels_ = ShiftedProductKernels<A>::here();
  const Taps rows_, columns_;
  const int64_t images_, outs_, channels_, in_rows_, in_columns_, phases_, pitch_;
  const bool from_innermost_, to_innermost_;
  const S *const from_, *const end_;
  S* const to_;
  std::vector<A> weights_;
  std::vector<int64_t> groups_, planes_, shifts_, places_;
  int64_t bands_, block_rows_, block_stride_, plane_;
};

}  // namespace

Tensor convolution_input_gradient(const Tensor& g, const Tensor& w, const ConvolutionAxis& height,
                                  const ConvolutionAxis& width, at::MemoryFormat format) {
  Tensor result = at::empty({g.size(0), w.size(1), height.in, width.in}, g.options().memory_format(format));
  if (g.numel() == 0 || w.numel() == 0) return result.zero_();
  const bool innermost = !g.is_contiguous() && g.is_contiguous(at::MemoryFormat::ChannelsLast);
  const Tensor grad = innermost ? g : g.contiguous(), weight = w.contiguous();
  rk::visit_storage_of<Half, BFloat16>(g.scalar_type(), [&]<class S>(S) {
    InputGradient<S>(grad, weight, height, width, format == at::MemoryFormat::ChannelsLast, result).run();
  });
  return result;
}

}  // namespace rk::aten
