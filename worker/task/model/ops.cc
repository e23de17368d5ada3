#include "worker/task/runtime/torch.h"
// The precompiled header comes first.
#include "worker/task/model/causal_attention.h"
#include "worker/task/model/kernels.h"
#include "worker/task/model/ops.h"

namespace refinery::model {
namespace {

using simd::Bf16;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

constexpr int64_t kElementsPerThread = 16384;  // below this a second thread costs more than it brings

int64_t Grain(int64_t columns) { return std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, columns)); }

template <typename T>
T* Data(const at::Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// Calls body(T{}) with the storage type of `tensor`.
template <typename Body>
void WithType(const at::Tensor& tensor, const Body& body) {
  if (tensor.scalar_type() == at::kBFloat16) {
    body(Bf16{});
  } else {
    body(float{});
  }
}

struct RmsNormFunction : Function<RmsNormFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& weight, double eps) {
    const at::Tensor x = input.contiguous();
    const int64_t columns = x.size(-1), rows = x.numel() / std::max<int64_t>(1, columns);
    at::Tensor y = at::empty_like(x);
    at::Tensor inverse_rms = at::empty({rows}, x.options().dtype(at::kFloat));
    WithType(x, [&](auto type) {
      using T = decltype(type);
      at::parallel_for(0, rows, Grain(columns), [&](int64_t begin, int64_t end) {
        kernels::RmsNorm<T>(Data<T>(x) + begin * columns, Data<T>(weight), Data<T>(y) + begin * columns,
                            Data<float>(inverse_rms) + begin, end - begin, columns, static_cast<float>(eps));
      });
    });
    ctx->save_for_backward({x, weight, inverse_rms});
    return y;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor dy = grads[0].contiguous();
    const at::Tensor &x = saved[0], &weight = saved[1], &inverse_rms = saved[2];
    const int64_t columns = x.size(-1), rows = inverse_rms.size(0);
    at::Tensor dx = at::empty_like(x);
    WithType(x, [&](auto type) {
      using T = decltype(type);
      at::parallel_for(0, rows, Grain(columns), [&](int64_t begin, int64_t end) {
        const int64_t at = begin * columns;
        kernels::RmsNormBackward<T>(Data<T>(dy) + at, Data<T>(x) + at, Data<T>(weight), Data<float>(inverse_rms) + begin,
                                    Data<T>(dx) + at, end - begin, columns);
      });
    });
    return {dx, at::Tensor(), at::Tensor()};
  }
};

struct SiluMulFunction : Function<SiluMulFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input) {
    const at::Tensor gate_up = input.contiguous();
    const int64_t rows = gate_up.size(0), width = gate_up.size(1) / 2;
    at::Tensor out = at::empty({rows, width}, gate_up.options());
    WithType(out, [&](auto type) {
      using T = decltype(type);
      at::parallel_for(0, rows, Grain(width), [&](int64_t begin, int64_t end) {
        kernels::SiluMul<T>(Data<T>(gate_up) + 2 * begin * width, Data<T>(out) + begin * width, end - begin, width);
      });
    });
    ctx->save_for_backward({gate_up});
    return out;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const at::Tensor gate_up = ctx->get_saved_variables()[0];
    const at::Tensor dout = grads[0].contiguous();
    const int64_t rows = gate_up.size(0), width = gate_up.size(1) / 2;
    at::Tensor dgate_up = at::empty_like(gate_up);
    WithType(dout, [&](auto type) {
      using T = decltype(type);
      at::parallel_for(0, rows, Grain(width), [&](int64_t begin, int64_t end) {
        kernels::SiluMulBackward<T>(Data<T>(dout) + begin * width, Data<T>(gate_up) + 2 * begin * width,
                                    Data<T>(dgate_up) + 2 * begin * width, end - begin, width);
      });
    });
    return {dgate_up};
  }
};

// Rotates `heads` heads of rows of `from` (starting at column 0 of the given views) into `to`.
void RotateInto(const at::Tensor& from, const at::Tensor& to, const at::Tensor& cos, const at::Tensor& sin, float sign,
                int64_t heads, int64_t head_dim) {
  WithType(from, [&](auto type) {
    using T = decltype(type);
    at::parallel_for(0, from.size(0), Grain(heads * head_dim), [&](int64_t begin, int64_t end) {
      const kernels::RotateShape shape{end - begin, heads, head_dim, from.stride(0), to.stride(0)};
      kernels::Rotate<T>(Data<T>(from) + begin * from.stride(0), Data<T>(to) + begin * to.stride(0),
                         Data<float>(cos) + begin * head_dim, Data<float>(sin) + begin * head_dim, sign, shape);
    });
  });
}

// A run of consecutive sequences of one length.
struct Group {
  int64_t begin = 0, count = 0, length = 0;
};

std::vector<Group> GroupEqual(const std::vector<int64_t>& lengths) {
  std::vector<Group> groups;
  int64_t begin = 0;
  for (int64_t length : lengths) {
    if (!groups.empty() && groups.back().length == length) {
      ++groups.back().count;
    } else if (length > 0) {
      groups.push_back({begin, 1, length});
    }
    begin += length;
  }
  return groups;
}

// Rows of `x` [T, h*d] as [count, h, length, d] without a copy.
at::Tensor Heads(const at::Tensor& x, const Group& group, int64_t heads, int64_t head_dim) {
  return x.as_strided({group.count, heads, group.length, head_dim},
                      {group.length * x.stride(0), head_dim, x.stride(0), 1}, x.storage_offset() + group.begin * x.stride(0));
}

// 0 where a query may see a key, -inf elsewhere; undefined where plain causal attention is meant.
c10::optional<at::Tensor> WindowMask(int64_t length, int64_t window, const at::TensorOptions& options) {
  if (window <= 0 || length <= window) return c10::nullopt;
  const at::Tensor ones = at::ones({length, length}, options.dtype(at::kBool));
  const at::Tensor visible = ones.tril().logical_and(ones.triu(1 - window));
  return at::zeros({length, length}, options).masked_fill(visible.logical_not(), -INFINITY);
}

struct AttentionFunction : Function<AttentionFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& cos, const at::Tensor& sin,
                            const std::vector<int64_t>& lengths, const AttentionShape& shape) {
    const at::Tensor qkv = input.contiguous();
    const int64_t n = shape.heads, m = shape.kv_heads, d = shape.head_dim;
    const at::Tensor rotated = at::empty({qkv.size(0), (n + m) * d}, qkv.options());
    RotateInto(qkv, rotated, cos, sin, 1, n + m, d);
    const std::vector<Group> groups = GroupEqual(lengths);
    const at::Tensor q = rotated.narrow(1, 0, n * d), k = rotated.narrow(1, n * d, m * d);
    const at::Tensor v = qkv.narrow(1, (n + m) * d, m * d);
    const at::Tensor out = at::empty({qkv.size(0), n * d}, qkv.options());
    variable_list saved = {qkv, rotated, out, cos, sin};
    for (const Group& group : groups) {
      const auto mask = WindowMask(group.length, shape.sliding_window, qkv.options());
      auto [context, log_sum] = at::_scaled_dot_product_flash_attention_for_cpu(
          Heads(q, group, n, d), Heads(k, group, m, d), Heads(v, group, m, d), 0.0, !mask.has_value(), mask);
      Heads(out, group, n, d).copy_(context);
      saved.push_back(log_sum);
    }
    ctx->save_for_backward(saved);
    ctx->saved_data["lengths"] = lengths;
    ctx->saved_data["shape"] = std::vector<int64_t>{n, m, d, shape.sliding_window};
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const std::vector<int64_t> shape = ctx->saved_data["shape"].toIntVector();
    const int64_t n = shape[0], m = shape[1], d = shape[2];
    const at::Tensor &qkv = saved[0], &rotated = saved[1], &out = saved[2], &cos = saved[3], &sin = saved[4];
    const at::Tensor dout = grads[0].contiguous();
    const at::Tensor q = rotated.narrow(1, 0, n * d), k = rotated.narrow(1, n * d, m * d);
    const at::Tensor v = qkv.narrow(1, (n + m) * d, m * d);
    const at::Tensor dqkv = at::empty_like(qkv);
    size_t next = 5;
    for (const Group& group : GroupEqual(ctx->saved_data["lengths"].toIntVector())) {
      const auto mask = WindowMask(group.length, shape[3], qkv.options());
      auto [dq, dk, dv] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
          Heads(dout, group, n, d), Heads(q, group, n, d), Heads(k, group, m, d), Heads(v, group, m, d),
          Heads(out, group, n, d), saved[next++], 0.0, !mask.has_value(), mask);
      Heads(dqkv.narrow(1, 0, n * d), group, n, d).copy_(dq);
      Heads(dqkv.narrow(1, n * d, m * d), group, m, d).copy_(dk);
      Heads(dqkv.narrow(1, (n + m) * d, m * d), group, m, d).copy_(dv);
    }
    RotateInto(dqkv, dqkv, cos, sin, -1, n + m, d);
    return {dqkv, at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

// The same by the kernels of causal_attention.h.
struct CausalAttentionFunction : Function<CausalAttentionFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& cos, const at::Tensor& sin,
                            const std::vector<int64_t>& lengths, const AttentionShape& shape) {
    const at::Tensor qkv = input.contiguous(), out = CausalAttention(qkv, cos, sin, lengths, shape);
    ctx->save_for_backward({qkv, out, cos, sin});
    ctx->saved_data["lengths"] = lengths;
    ctx->saved_data["shape"] = std::vector<int64_t>{shape.heads, shape.kv_heads, shape.head_dim, shape.sliding_window};
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const std::vector<int64_t> s = ctx->saved_data["shape"].toIntVector();
    const AttentionShape shape{.heads = s[0], .kv_heads = s[1], .head_dim = s[2], .sliding_window = s[3]};
    const at::Tensor dqkv = CausalAttentionGradient(grads[0].contiguous(), saved[1], saved[0], saved[2], saved[3],
                                                    ctx->saved_data["lengths"].toIntVector(), shape);
    RotateInto(dqkv, dqkv, saved[2], saved[3], -1, shape.heads + shape.kv_heads, shape.head_dim);
    return {dqkv, at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

// Right-padded batches under a causal mask: a token never sees the padding, which lies after it. Sequences share a batch
// while the shortest has at least half the length of the longest.
at::Tensor PaddedAttention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::vector<int64_t>& lengths,
                           const AttentionShape& shape) {
  std::vector<int64_t> starts(lengths.size()), order(lengths.size());
  for (size_t i = 0, at = 0; i < lengths.size(); at += lengths[i++]) starts[i] = static_cast<int64_t>(at);
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
  std::ranges::stable_sort(order, [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
  std::vector<at::Tensor> contexts;
  std::vector<int64_t> rows;  // packed row of each context row
  for (size_t first = 0; first < order.size() && lengths[order[first]] > 0;) {
    const int64_t longest = lengths[order[first]];
    size_t last = first;
    while (last < order.size() && 2 * lengths[order[last]] >= longest) ++last;
    std::vector<int64_t> gather, scatter;  // packed row of each padded cell; padded cell of each packed row
    for (size_t i = first; i < last; ++i) {
      for (int64_t t = 0; t < longest; ++t) {
        const int64_t row = starts[order[i]] + std::min(t, lengths[order[i]] - 1);
        if (t < lengths[order[i]]) {
          scatter.push_back(static_cast<int64_t>(gather.size()));
          rows.push_back(row);
        }
        gather.push_back(row);
      }
    }
    const auto padded = [&](const at::Tensor& x, int64_t heads) {
      const at::Tensor index = at::tensor(gather, at::kLong).to(x.device());
      return x.index_select(0, index).view({static_cast<int64_t>(last - first), longest, heads, shape.head_dim}).transpose(1, 2);
    };
    const auto mask = WindowMask(longest, shape.sliding_window, q.options());
    const at::Tensor context = at::scaled_dot_product_attention(
        padded(q, shape.heads), padded(k, shape.kv_heads), padded(v, shape.kv_heads), mask, 0.0, !mask.has_value(),
        c10::nullopt, shape.heads != shape.kv_heads);
    contexts.push_back(context.transpose(1, 2).reshape({-1, shape.heads * shape.head_dim})
                           .index_select(0, at::tensor(scatter, at::kLong).to(q.device())));
    first = last;
  }
  std::vector<int64_t> inverse(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) inverse[rows[i]] = static_cast<int64_t>(i);
  return at::cat(contexts).index_select(0, at::tensor(inverse, at::kLong).to(q.device()));
}

at::Tensor RotatedPlain(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, int64_t head_dim) {
  const at::ScalarType compute = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor heads = x.reshape({x.size(0), -1, head_dim}).to(compute);
  const std::vector<at::Tensor> halves = heads.chunk(2, -1);
  const at::Tensor turned = at::cat({-halves[1], halves[0]}, -1);
  return (heads * cos.unsqueeze(1) + turned * sin.unsqueeze(1)).to(x.scalar_type()).view(x.sizes());
}

}  // namespace

bool TakesCpuKernels(const at::Tensor& x) {
  return x.is_cpu() && (x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kFloat);
}

at::Tensor RmsNorm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  TORCH_CHECK(weight.dim() == 1 && x.size(-1) == weight.size(0), "RmsNorm: x ", x.sizes(), ", weight ", weight.sizes());
  if (TakesCpuKernels(x) && weight.scalar_type() == x.scalar_type() && weight.is_contiguous()) {
    return RmsNormFunction::apply(x, weight, eps);
  }
  const at::ScalarType compute = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor wide = x.to(compute);
  return (wide * (wide.square().mean(-1, true) + eps).rsqrt() * weight.to(compute)).to(x.scalar_type());
}

at::Tensor SiluMul(const at::Tensor& gate_up) {
  TORCH_CHECK(gate_up.dim() == 2 && gate_up.size(1) % 2 == 0, "SiluMul: gate_up ", gate_up.sizes());
  if (TakesCpuKernels(gate_up)) return SiluMulFunction::apply(gate_up);
  const std::vector<at::Tensor> halves = gate_up.chunk(2, 1);
  return at::silu(halves[0]) * halves[1];
}

at::Tensor PackedAttention(const at::Tensor& qkv, const at::Tensor& cos, const at::Tensor& sin,
                           const std::vector<int64_t>& lengths, const AttentionShape& shape) {
  const int64_t n = shape.heads, m = shape.kv_heads, d = shape.head_dim;
  int64_t total = 0;
  for (int64_t length : lengths) total += length;
  TORCH_CHECK(qkv.dim() == 2 && qkv.size(0) == total && qkv.size(1) == (n + 2 * m) * d, "PackedAttention: qkv ", qkv.sizes(),
              ", lengths sum to ", total);
  TORCH_CHECK(cos.size(0) == total && cos.size(1) == d && sin.sizes() == cos.sizes(), "PackedAttention: cos ", cos.sizes());
  if (TakesCausalAttention(qkv, lengths, shape)) {
    const bool gradient = at::GradMode::is_enabled() && qkv.requires_grad();
    return gradient ? CausalAttentionFunction::apply(qkv, cos.contiguous(), sin.contiguous(), lengths, shape)
                    : CausalAttention(qkv, cos.contiguous(), sin.contiguous(), lengths, shape);
  }
  if (TakesCpuKernels(qkv)) return AttentionFunction::apply(qkv, cos.contiguous(), sin.contiguous(), lengths, shape);
  const at::Tensor q = RotatedPlain(qkv.narrow(1, 0, n * d), cos, sin, d);
  const at::Tensor k = RotatedPlain(qkv.narrow(1, n * d, m * d), cos, sin, d);
  return PaddedAttention(q, k, qkv.narrow(1, (n + m) * d, m * d), lengths, shape);
}

at::Tensor Rotated(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, int64_t head_dim) {
  if (!TakesCpuKernels(x)) return RotatedPlain(x, cos, sin, head_dim);
  const at::Tensor out = at::empty(x.sizes(), x.options());
  RotateInto(x.stride(1) == 1 ? x : x.contiguous(), out, cos, sin, 1, x.size(1) / head_dim, head_dim);
  return out;
}

}  // namespace refinery::model
