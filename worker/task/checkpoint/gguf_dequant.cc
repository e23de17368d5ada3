#include "worker/task/checkpoint/gguf_dequant.h"

#include <c10/util/Half.h>

#include <cstring>

namespace refinery::checkpoint {
namespace {

constexpr int kSuper = 256;  // elements of a k-quant super-block

float HalfAt(const uint8_t* bytes) {
  uint16_t bits;
  std::memcpy(&bits, bytes, sizeof(bits));
  return c10::detail::fp16_ieee_to_fp32_value(bits);
}

uint32_t Word(const uint8_t* bytes) {
  uint32_t word;
  std::memcpy(&word, bytes, sizeof(word));
  return word;
}

void FromF32(const uint8_t* in, int64_t count, float* out) { std::memcpy(out, in, count * sizeof(float)); }

void FromF16(const uint8_t* in, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = HalfAt(in + 2 * i);
}

void FromBf16(const uint8_t* in, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits = (uint32_t{in[2 * i]} | uint32_t{in[2 * i + 1]} << 8) << 16;
    std::memcpy(out + i, &bits, sizeof(bits));
  }
}

// Q4 and Q5 blocks hold 32 values: the low nibbles are elements 0-15, the high nibbles 16-31; Q5 keeps the fifth bits
// in one word. The *_0 forms subtract a constant, the *_1 forms add a minimum.
template <bool kFifthBit, bool kHasMinimum>
void FromQ4Q5(const uint8_t* in, int64_t count, float* out) {
  constexpr int kHeader = kHasMinimum ? 4 : 2;
  constexpr int kBytes = kHeader + (kFifthBit ? 4 : 0) + 16;
  constexpr int kOffset = kHasMinimum ? 0 : (kFifthBit ? 16 : 8);
  for (int64_t b = 0; b < count; ++b, in += kBytes, out += 32) {
    const float d = HalfAt(in);
    const float m = kHasMinimum ? HalfAt(in + 2) : 0.0f;
    const uint32_t high = kFifthBit ? Word(in + kHeader) : 0;
    const uint8_t* qs = in + kBytes - 16;
    for (int i = 0; i < 32; ++i) {
      int q = i < 16 ? qs[i] & 0xF : qs[i - 16] >> 4;
      if (kFifthBit) q |= static_cast<int>((high >> i) & 1) << 4;
      float product = d * static_cast<float>(q - kOffset);
      out[i] = kHasMinimum ? product + m : product;
    }
  }
}

void FromQ8_0(const uint8_t* in, int64_t count, float* out) {
  for (int64_t b = 0; b < count; ++b, in += 34, out += 32) {
    const float d = HalfAt(in);
    for (int i = 0; i < 32; ++i) out[i] = static_cast<float>(static_cast<int8_t>(in[2 + i])) * d;
  }
}

// Blocks of 32 like Q4_0, but the codes number entries of a table whose steps widen outwards.
void FromIq4Nl(const uint8_t* in, int64_t count, float* out) {
  constexpr float kTable[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
  for (int64_t b = 0; b < count; ++b, in += 18, out += 32) {
    const float d = HalfAt(in);
    for (int i = 0; i < 16; ++i) {
      out[i] = d * kTable[in[2 + i] & 0xF];
      out[16 + i] = d * kTable[in[2 + i] >> 4];
    }
  }
}

// 16 groups of 16; scales (low nibble) and minima (high nibble), 2-bit codes, d, dmin.
void FromQ2K(const uint8_t* in, int64_t count, float* out) {
  for (int64_t b = 0; b < count; ++b, in += 84, out += kSuper) {
    const uint8_t* scales = in;
    const uint8_t* qs = in + 16;
    const float d = HalfAt(in + 80), dmin = HalfAt(in + 82);
    for (int i = 0; i < kSuper; ++i) {
      // Codes of elements 128c + 32s + l lie in byte 32c + l at bit 2s.
      int chunk = i / 128, shift = (i / 32) % 4, lane = i % 32;
      int q = (qs[32 * chunk + lane] >> (2 * shift)) & 3;
      float dl = d * static_cast<float>(scales[i / 16] & 0xF);
      float ml = dmin * static_cast<float>(scales[i / 16] >> 4);
      float product = dl * static_cast<float>(q);
      out[i] = product - ml;
    }
  }
}

// 16 groups of 16; high-bit mask, 2-bit codes, 6-bit scales minus 32, d. A clear mask bit means minus 4.
void FromQ3K(const uint8_t* in, int64_t count, float* out) {
  for (int64_t b = 0; b < count; ++b, in += 110, out += kSuper) {
    const uint8_t* mask = in;
    const uint8_t* qs = in + 32;
    const uint8_t* packed = in + 96;
    const float d = HalfAt(in + 108);
    float scales[16];
    for (int g = 0; g < 16; ++g) {
      int low = g < 8 ? packed[g] & 0xF : packed[g - 8] >> 4;
      int high = (packed[8 + g % 4] >> (2 * (g / 4))) & 3;
      scales[g] = d * static_cast<float>((low | high << 4) - 32);
    }
    for (int i = 0; i < kSuper; ++i) {
      int chunk = i / 128, shift = (i / 32) % 4, lane = i % 32;
      int q = (qs[32 * chunk + lane] >> (2 * shift)) & 3;
      if (((mask[lane] >> (i / 32)) & 1) == 0) q -= 4;
      out[i] = scales[i / 16] * static_cast<float>(q);
    }
  }
}

// The eight 6-bit scales and minima of Q4_K and Q5_K, packed into 12 bytes.
void UnpackScales(const uint8_t* packed, int* scales, int* minima) {
  for (int g = 0; g < 4; ++g) {
    scales[g] = packed[g] & 63;
    minima[g] = packed[4 + g] & 63;
    scales[4 + g] = (packed[8 + g] & 0xF) | ((packed[g] >> 2) & 0x30);
    minima[4 + g] = (packed[8 + g] >> 4) | ((packed[4 + g] >> 2) & 0x30);
  }
}

// 8 groups of 32; d, dmin, packed scales, [fifth bits,] 4-bit codes.
template <bool kFifthBit>
void FromQ4KQ5K(const uint8_t* in, int64_t count, float* out) {
  constexpr int kBytes = 16 + (kFifthBit ? 32 : 0) + 128;
  for (int64_t b = 0; b < count; ++b, in += kBytes, out += kSuper) {
    const float d = HalfAt(in), dmin = HalfAt(in + 2);
    int scales[8], minima[8];
    UnpackScales(in + 4, scales, minima);
    const uint8_t* high = in + 16;
    const uint8_t* qs = in + kBytes - 128;
    for (int g = 0; g < 8; ++g) {
      const float scale = d * static_cast<float>(scales[g]);
      const float minimum = dmin * static_cast<float>(minima[g]);
      for (int l = 0; l < 32; ++l) {
        int q = (qs[32 * (g / 2) + l] >> (4 * (g % 2))) & 0xF;
        if (kFifthBit) q |= ((high[l] >> g) & 1) << 4;
        float product = scale * static_cast<float>(q);
        out[32 * g + l] = product - minimum;
      }
    }
  }
}

// 16 groups of 16; low 4 bits, high 2 bits, 8-bit scales, d. Codes are offset by 32.
void FromQ6K(const uint8_t* in, int64_t count, float* out) {
  for (int64_t b = 0; b < count; ++b, in += 210, out += kSuper) {
    const uint8_t* low = in;
    const uint8_t* high = in + 128;
    const uint8_t* scales = in + 192;
    const float d = HalfAt(in + 208);
    for (int i = 0; i < kSuper; ++i) {
      int half = i / 128, within = i % 128;
      int q = (low[64 * half + within % 64] >> (4 * (within / 64))) & 0xF;
      q |= ((high[32 * half + within % 32] >> (2 * (within / 32))) & 3) << 4;
      float scale = d * static_cast<float>(static_cast<int8_t>(scales[i / 16]));
      out[i] = scale * static_cast<float>(q - 32);
    }
  }
}

constexpr GgufType kTypes[] = {
    {0, "F32", 1, 4, FromF32},
    {1, "F16", 1, 2, FromF16},
    {2, "Q4_0", 32, 18, FromQ4Q5<false, false>},
    {3, "Q4_1", 32, 20, FromQ4Q5<false, true>},
    {6, "Q5_0", 32, 22, FromQ4Q5<true, false>},
    {7, "Q5_1", 32, 24, FromQ4Q5<true, true>},
    {8, "Q8_0", 32, 34, FromQ8_0},
    {10, "Q2_K", kSuper, 84, FromQ2K},
    {11, "Q3_K", kSuper, 110, FromQ3K},
    {12, "Q4_K", kSuper, 144, FromQ4KQ5K<false>},
    {13, "Q5_K", kSuper, 176, FromQ4KQ5K<true>},
    {14, "Q6_K", kSuper, 210, FromQ6K},
    {20, "IQ4_NL", 32, 18, FromIq4Nl},
    {30, "BF16", 1, 2, FromBf16},
};

}  // namespace

const GgufType* FindGgufType(uint32_t id) {
  for (const GgufType& type : kTypes)
    if (type.id == id) return &type;
  return nullptr;
}

std::string KnownGgufTypes() {
  std::string names;
  for (const GgufType& type : kTypes) {
    if (!names.empty()) names += ", ";
    names += type.name;
  }
  return names;
}

}  // namespace refinery::checkpoint
