// Philox for eight counters side by side.  The one place with intrinsics: the product of two 32-bit words with all of its
// 64 bits is an instruction of every x86-64, but compilers surround it with shuffles when they find it in a loop.
#pragma once

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "../math/philox.h"

namespace rk::cpu {

constexpr int kPhiloxLanes = 8;

struct WordLanes {
  alignas(32) std::uint32_t w[4][kPhiloxLanes];
};

// Counters (block, block's upper half, sample, stream), of which block and sample grow by their steps from lane to lane.
RK_HOST_DEVICE void philox_lanes(PhiloxKey key, std::uint64_t block, std::uint32_t block_step, std::uint32_t sample,
                                 std::uint32_t sample_step, std::uint32_t stream, WordLanes& words) {
#if defined(__SSE2__)
  const __m128i a = _mm_set1_epi64x(0xD2511F53), b = _mm_set1_epi64x(0xCD9E8D57);
  for (int l = 0; l < kPhiloxLanes; l += 4) {
    // Two by two in the lower halves of 64-bit lanes, c and d at the same time; the upper halves hold garbage.
    const std::int64_t n = std::int64_t(block + std::uint64_t(block_step) * l), m = sample + sample_step * l;
    __m128i c0 = _mm_set_epi64x(n + block_step, n), c1 = _mm_srli_epi64(c0, 32);
    __m128i d0 = _mm_set_epi64x(n + 3 * block_step, n + 2 * block_step), d1 = _mm_srli_epi64(d0, 32);
    __m128i c2 = _mm_set_epi64x(m + sample_step, m), c3 = _mm_set1_epi64x(stream);
    __m128i d2 = _mm_set_epi64x(m + 3 * sample_step, m + 2 * sample_step), d3 = c3;
    for (int round = 0; round < 10; ++round) {
      const __m128i k0 = _mm_set1_epi64x(key.k0), k1 = _mm_set1_epi64x(key.k1);
      const __m128i ac = _mm_mul_epu32(a, c0), bc = _mm_mul_epu32(b, c2);
      const __m128i ad = _mm_mul_epu32(a, d0), bd = _mm_mul_epu32(b, d2);
      c0 = _mm_xor_si128(_mm_srli_epi64(bc, 32), _mm_xor_si128(c1, k0));
      d0 = _mm_xor_si128(_mm_srli_epi64(bd, 32), _mm_xor_si128(d1, k0));
      c2 = _mm_xor_si128(_mm_srli_epi64(ac, 32), _mm_xor_si128(c3, k1));
      d2 = _mm_xor_si128(_mm_srli_epi64(ad, 32), _mm_xor_si128(d3, k1));
      c1 = bc, c3 = ac, d1 = bd, d3 = ad;
      key.k0 += 0x9E3779B9u;
      key.k1 += 0xBB67AE85u;
    }
    key.k0 -= 10 * 0x9E3779B9u;
    key.k1 -= 10 * 0xBB67AE85u;
    const __m128i c[4] = {c0, c1, c2, c3}, d[4] = {d0, d1, d2, d3};
    for (int j = 0; j < 4; ++j) {
      const __m128i low = _mm_unpacklo_epi64(_mm_shuffle_epi32(c[j], 0x88), _mm_shuffle_epi32(d[j], 0x88));
      _mm_store_si128(reinterpret_cast<__m128i*>(words.w[j] + l), low);
    }
  }
#else
  for (int l = 0; l < kPhiloxLanes; ++l) {
    const std::uint64_t n = block + std::uint64_t(block_step) * l;
    const RandomWords w = philox({std::uint32_t(n), std::uint32_t(n >> 32), sample + sample_step * l, stream}, key);
    words.w[0][l] = w.w0, words.w[1][l] = w.w1, words.w[2][l] = w.w2, words.w[3][l] = w.w3;
  }
#endif
}

}  // namespace rk::cpu
