// Writes random quantized layers and their packed form, one file for each layout:  packing_probe FOLDER
// Read by packing.py.

#include "worker/task/runtime/torch.h"

#include <cstdio>
#include <string>

#include "common/status.h"
#include "worker/task/checkpoint/safetensors.h"
#include "worker/task/quantize/gptq.h"

namespace refinery {
namespace {

quantize::QuantizedLinear Draw(int64_t bits, int64_t group_size, int64_t out, int64_t in, bool symmetric, bool act_order) {
  const int64_t size = group_size < 0 ? in : group_size, groups = (in + size - 1) / size, levels = int64_t{1} << bits;
  quantize::QuantizedLinear linear{.codes = at::randint(0, levels, {out, in}, at::kByte),
                                   .scales = ((at::rand({out, groups}) - 0.5) * 0.1).to(at::kHalf), .bits = bits, .group_size = size};
  if (!symmetric) linear.zeros = at::randint(1, levels, {out, groups}, at::kByte);
  if (act_order) linear.group_index = at::arange(in, at::kInt).floor_divide(size).to(at::kInt).index_select(0, at::randperm(in));
  return linear;
}

Status Run(const std::string& folder) {
  at::manual_seed(17);
  for (const int64_t bits : {2, 3, 4, 8}) {
    for (const int64_t group_size : {-1, 16, 32, 64, 128}) {
      for (const auto& [out, in] : {std::pair<int64_t, int64_t>{64, 192}, {96, 576}, {32, 128}}) {
        for (int kind = 0; kind < 8; ++kind) {
          const bool symmetric = kind % 2 == 0, act_order = kind / 2 % 2 == 1;
          const int64_t version = kind / 4 + 1;
          const quantize::QuantizedLinear linear = Draw(bits, group_size, out, in, symmetric, act_order);
          const quantize::PackedGptq packed = version == 1 ? quantize::PackGptqV1(linear) : quantize::PackGptqV2(linear);
          const at::Tensor zeros =
              linear.zeros.defined() ? linear.zeros : at::full_like(linear.scales, 1 << (bits - 1)).to(at::kByte);
          RF_RETURN_IF_ERROR(checkpoint::WriteSafetensors(
              Join(folder, "/b", bits, "_g", group_size, "_", out, "x", in, symmetric ? "_sym" : "_asym",
                   act_order ? "_actorder" : "_natural", "_v", version, ".safetensors"),
              {{"codes", linear.codes}, {"zeros", zeros}, {"qweight", packed.qweight}, {"qzeros", packed.qzeros},
               {"scales", packed.scales}, {"g_idx", packed.g_idx}}));
        }
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace
}  // namespace refinery

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: packing_probe FOLDER\n");
    return 2;
  }
  const refinery::Status status = refinery::Run(argv[1]);
  if (!status.ok()) std::fprintf(stderr, "%s\n", refinery::Message(status).c_str());
  return status.ok() ? 0 : 1;
}
