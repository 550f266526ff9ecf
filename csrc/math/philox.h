// Philox4x32-10 (Salmon, Moraes, Dror and Shaw, 2011): 128 random bits from a counter and a key.  There is no state: any
// thread draws any part of a sequence, in any order, again and again.
#pragma once

#include "scalar.h"

namespace rk {

struct PhiloxKey {
  std::uint32_t k0, k1;
  RK_HOST_DEVICE explicit PhiloxKey(std::uint64_t seed) : k0(std::uint32_t(seed)), k1(std::uint32_t(seed >> 32)) {}
};

struct RandomWords {
  std::uint32_t w0, w1, w2, w3;
};

RK_HOST_DEVICE std::uint32_t multiply_high(std::uint32_t a, std::uint32_t b) {
  return std::uint32_t((std::uint64_t(a) * b) >> 32);
}

RK_HOST_DEVICE RandomWords philox(RandomWords c, PhiloxKey key) {
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const std::uint32_t a = 0xD2511F53u, b = 0xCD9E8D57u;
    c = {multiply_high(b, c.w2) ^ c.w1 ^ key.k0, b * c.w2, multiply_high(a, c.w0) ^ c.w3 ^ key.k1, a * c.w0};
    key.k0 += 0x9E3779B9u;
    key.k1 += 0xBB67AE85u;
  }
  return c;
}

}  // namespace rk
