#include "worker/task/model/kernels.h"

#include "worker/task/model/simd.h"

// One body per kernel as an always-inlined template; below, one clone set per kernel and storage type.
namespace refinery::kernels {
namespace {

using namespace refinery::simd;  // NOLINT(google-build-using-namespace): the vocabulary of this file

template <typename T>
RF_INLINE void RmsNormBody(const T* x, const T* weight, T* y, float* inverse_rms, int64_t rows, int64_t columns, float eps) {
  const int64_t whole = columns / kLanes * kLanes;
  for (int64_t r = 0; r < rows; ++r, x += columns, y += columns) {
    Floats squares = {};
    for (int64_t c = 0; c < whole; c += kLanes) {
      const Floats v = Load(x + c);
      squares += v * v;
    }
    float sum = Sum(squares);
    for (int64_t c = whole; c < columns; ++c) sum += ToFloat(x[c]) * ToFloat(x[c]);
    const float scale = 1.0f / std::sqrt(sum / static_cast<float>(columns) + eps);
    if (inverse_rms != nullptr) inverse_rms[r] = scale;
    for (int64_t c = 0; c < whole; c += kLanes) Store(y + c, Load(x + c) * scale * Load(weight + c));
    for (int64_t c = whole; c < columns; ++c) Assign(y + c, ToFloat(x[c]) * scale * ToFloat(weight[c]));
  }
}

// With s = inverse_rms and g = dy * weight:  dx = s g - x s^3 <g, x> / columns.
template <typename T>
RF_INLINE void RmsNormBackwardBody(const T* dy, const T* x, const T* weight, const float* inverse_rms, T* dx, int64_t rows,
                                   int64_t columns) {
  const int64_t whole = columns / kLanes * kLanes;
  for (int64_t r = 0; r < rows; ++r, x += columns, dy += columns, dx += columns) {
    Floats dots = {};
    for (int64_t c = 0; c < whole; c += kLanes) dots += Load(dy + c) * Load(weight + c) * Load(x + c);
    float dot = Sum(dots);
    for (int64_t c = whole; c < columns; ++c) dot += ToFloat(dy[c]) * ToFloat(weight[c]) * ToFloat(x[c]);
    const float s = inverse_rms[r];
    const float k = s * s * s * dot / static_cast<float>(columns);
    for (int64_t c = 0; c < whole; c += kLanes) Store(dx + c, Load(dy + c) * Load(weight + c) * s - Load(x + c) * k);
    for (int64_t c = whole; c < columns; ++c) {
      Assign(dx + c, ToFloat(dy[c]) * ToFloat(weight[c]) * s - ToFloat(x[c]) * k);
    }
  }
}

template <typename T>
RF_INLINE void RotateBody(const T* from, T* to, const float* cos, const float* sin, float sign, const RotateShape& shape) {
  const int64_t d = shape.head_dim, half = d / 2, whole = half / kLanes * kLanes;
  for (int64_t r = 0; r < shape.rows; ++r, cos += d, sin += d, from += shape.from_stride, to += shape.to_stride) {
    for (int64_t h = 0; h < shape.heads; ++h) {
      const T* a = from + h * d;
      const T* b = a + half;
      T* out = to + h * d;
      for (int64_t i = 0; i < whole; i += kLanes) {
        const Floats c = Load(cos + i), s = Load(sin + i) * sign, va = Load(a + i), vb = Load(b + i);
        Store(out + i, va * c - vb * s);
        Store(out + half + i, vb * c + va * s);
      }
      for (int64_t i = whole; i < half; ++i) {
        const float c = cos[i], s = sin[i] * sign, va = ToFloat(a[i]), vb = ToFloat(b[i]);
        Assign(out + i, va * c - vb * s);
        Assign(out + half + i, vb * c + va * s);
      }
    }
  }
}

template <typename T>
RF_INLINE void SiluMulBody(const T* gate_up, T* out, int64_t rows, int64_t width) {
  const int64_t whole = width / kLanes * kLanes;
  for (int64_t r = 0; r < rows; ++r, gate_up += 2 * width, out += width) {
    for (int64_t c = 0; c < whole; c += kLanes) {
      const Floats g = Load(gate_up + c);
      Store(out + c, g / (1.0f + Exp(-g)) * Load(gate_up + width + c));
    }
    for (int64_t c = whole; c < width; ++c) {
      const float g = ToFloat(gate_up[c]);
      Assign(out + c, g / (1.0f + ScalarExp(-g)) * ToFloat(gate_up[width + c]));
    }
  }
}

// With s = sigmoid(g):  d silu(g) / dg = s (1 + g (1 - s)).
template <typename T>
RF_INLINE void SiluMulBackwardBody(const T* dout, const T* gate_up, T* dgate_up, int64_t rows, int64_t width) {
  const int64_t whole = width / kLanes * kLanes;
  for (int64_t r = 0; r < rows; ++r, gate_up += 2 * width, dgate_up += 2 * width, dout += width) {
    for (int64_t c = 0; c < whole; c += kLanes) {
      const Floats g = Load(gate_up + c), u = Load(gate_up + width + c), dy = Load(dout + c);
      const Floats s = 1.0f / (1.0f + Exp(-g));
      Store(dgate_up + c, dy * u * s * (1.0f + g * (1.0f - s)));
      Store(dgate_up + width + c, dy * g * s);
    }
    for (int64_t c = whole; c < width; ++c) {
      const float g = ToFloat(gate_up[c]), u = ToFloat(gate_up[width + c]), dy = ToFloat(dout[c]);
      const float s = 1.0f / (1.0f + ScalarExp(-g));
      Assign(dgate_up + c, dy * u * s * (1.0f + g * (1.0f - s)));
      Assign(dgate_up + width + c, dy * g * s);
    }
  }
}

}  // namespace

// target_clones does not apply to templates, hence a plain overload per type behind each explicit specialization.
#define RF_KERNEL(T, Name, Parameters, Arguments)                              \
  RF_CPU_CLONES static void Name##Clones Parameters { Name##Body Arguments; }  \
  template <>                                                                  \
  void Name<T> Parameters {                                                    \
    Name##Clones Arguments;                                                    \
  }

#define RF_KERNELS(T)                                                                                                     \
  RF_KERNEL(T, RmsNorm,                                                                                                   \
            (const T* x, const T* weight, T* y, float* inverse_rms, int64_t rows, int64_t columns, float eps),            \
            (x, weight, y, inverse_rms, rows, columns, eps))                                                              \
  RF_KERNEL(T, RmsNormBackward,                                                                                           \
            (const T* dy, const T* x, const T* weight, const float* inverse_rms, T* dx, int64_t rows, int64_t columns),   \
            (dy, x, weight, inverse_rms, dx, rows, columns))                                                              \
  RF_KERNEL(T, Rotate, (const T* from, T* to, const float* cos, const float* sin, float sign, const RotateShape& shape),  \
            (from, to, cos, sin, sign, shape))                                                                            \
  RF_KERNEL(T, SiluMul, (const T* gate_up, T* out, int64_t rows, int64_t width), (gate_up, out, rows, width))             \
  RF_KERNEL(T, SiluMulBackward, (const T* dout, const T* gate_up, T* dgate_up, int64_t rows, int64_t width),              \
            (dout, gate_up, dgate_up, rows, width))

RF_KERNELS(float)
RF_KERNELS(Bf16)

}  // namespace refinery::kernels
