// Importing models: a small GGUF against transformers' own GGUF loader (tests/vectors/gguf/make_model.py), the cache,
// and what a model reference promises.
#include "worker/task/runtime/torch.h"
//
#include "worker/task/checkpoint/import.h"

#include <chrono>
#include <cstdlib>
#include <thread>

#include "common/digest.h"
#include "tests/support/status_matchers.h"
#include "tests/worker/task/checkpoint/folder_fixture.h"
#include "worker/task/checkpoint/model_folder.h"
#include "worker/task/checkpoint/safetensors.h"

namespace refinery::checkpoint {
namespace {

using ::refinery::testing::IsOk;
using ::refinery::testing::IsOkAndHolds;
using ::refinery::testing::StatusIs;
using ::testing::HasSubstr;
using nlohmann::json;
namespace fs = std::filesystem;

const fs::path kTiny = fs::path(REFINERY_SOURCE_DIR) / "tests/vectors/gguf/tiny.gguf";

class ImportTest : public FolderTest {
 protected:
  fs::path Cache() const { return folder_ / "cache"; }

  // A Hugging Face folder with one tensor and a stand-in tokenizer.
  fs::path MakeFolder() {
    fs::path path = folder_ / "model";
    Write("model/config.json", R"({"architectures": ["LlamaForCausalLM"], "vocab_size": 10})");
    Write("model/tokenizer.json", "{}");
    EXPECT_THAT(WriteSafetensors(path / "model.safetensors", {{"model.norm.weight", at::ones({7})}}), IsOk());
    return path;
  }
};

// Goal: names, order of rows, types and rounding are those of transformers.  Method: SHA-256 of every tensor in bf16.
TEST_F(ImportTest, GgufWeightsAndConfigEqualTransformersOwnLoader) {
  json expected = json::parse(*ReadFile(kTiny.parent_path() / "tiny.json"));
  auto ref = ImportModel(kTiny.string(), Cache());
  ASSERT_THAT(ref, IsOk());
  EXPECT_EQ(ref->architecture, "LlamaForCausalLM");
  EXPECT_EQ(ref->vocab_size, expected["config"]["vocab_size"]);
  EXPECT_EQ(ref->source_digest, *DigestOfFile(kTiny));
  auto folder = ResolveModel(*ref, Cache());
  ASSERT_THAT(folder, IsOk());
  auto model = ModelFolder::Open(*folder);
  ASSERT_THAT(model, IsOk());
  for (const auto& [key, value] : expected["config"].items()) {
    const json& ours = (*model)->config()[key];
    // transformers keeps 1e-5 as the float32 that the file holds, widened.
    if (value.is_number_float()) {
      EXPECT_FLOAT_EQ(ours.get<float>(), value.get<float>()) << key;
    } else {
      EXPECT_EQ(ours, value) << key;
    }
  }
  EXPECT_EQ((*model)->config()["tie_word_embeddings"], true);
  EXPECT_EQ((*model)->Names().size(), expected["tensors"].size());
  uint64_t parameters = 0;
  for (const auto& [name, facts] : expected["tensors"].items()) {
    auto tensor = (*model)->Get(name);
    ASSERT_THAT(tensor, IsOk());
    EXPECT_EQ(tensor->scalar_type(), at::kBFloat16);
    EXPECT_EQ(tensor->sizes().vec(), facts["shape"].get<std::vector<int64_t>>()) << name;
    std::string digest = DigestOf({static_cast<const char*>(tensor->data_ptr()), tensor->nbytes()});
    EXPECT_EQ(digest, Join("sha256:", facts["sha256"].get<std::string>())) << name;
    parameters += static_cast<uint64_t>(tensor->numel());
  }
  EXPECT_EQ(ref->parameters, parameters);
  json generation = json::parse(*ReadFile(*folder / "generation_config.json"));
  EXPECT_EQ(generation["eos_token_id"], 1);
  json tokenizer_config = json::parse(*ReadFile(*folder / "tokenizer_config.json"));
  EXPECT_THAT(tokenizer_config["chat_template"].get<std::string>(), HasSubstr("add_generation_prompt"));
}

TEST_F(ImportTest, TheSameFileGivesTheSameDigestInEveryCache) {
  auto first = ImportModel(kTiny.string(), Cache());
  auto second = ImportModel(Join("file://", kTiny.string()), folder_ / "other");
  ASSERT_THAT(first, IsOk());
  ASSERT_THAT(second, IsOk());
  EXPECT_EQ(first->digest, second->digest);
  EXPECT_NE(first->digest, first->source_digest);
}

TEST_F(ImportTest, ConcurrentImportsAgreeAndLeaveNothingBehind) {
  std::vector<std::thread> threads;
  std::vector<std::string> digests(6);
  for (std::string& digest : digests)
    threads.emplace_back([&digest, this] {
      auto ref = ImportModel(kTiny.string(), Cache());
      if (ref.ok()) digest = ref->digest;
    });
  for (std::thread& thread : threads) thread.join();
  for (const std::string& digest : digests) EXPECT_EQ(digest, digests[0]);
  EXPECT_TRUE(IsDigest(digests[0]));
  int folders = 0;
  for (const auto& entry : fs::directory_iterator(Cache() / "models")) folders += entry.is_directory() ? 1 : 0;
  EXPECT_EQ(folders, 1);
}

TEST_F(ImportTest, ResolveFindsTheCacheAfterTheSourceIsGoneAndRebuildsALostCache) {
  fs::path source = Write("copy.gguf", *ReadFile(kTiny));
  auto ref = ImportModel(source.string(), Cache());
  ASSERT_THAT(ref, IsOk());
  fs::remove_all(Cache());
  auto folder = ResolveModel(*ref, Cache());
  ASSERT_THAT(folder, IsOk());
  fs::remove(source);
  EXPECT_THAT(ResolveModel(*ref, Cache()), IsOkAndHolds(*folder));
  fs::remove_all(Cache());
  EXPECT_THAT(ResolveModel(*ref, Cache()), StatusIs(absl::StatusCode::kNotFound, HasSubstr("copy.gguf")));
}

TEST_F(ImportTest, AFolderIsUsedInPlaceAndAChangeIsNoticed) {
  fs::path model = MakeFolder();
  auto ref = ImportModel(model.string(), Cache());
  ASSERT_THAT(ref, IsOk());
  EXPECT_EQ(ref->parameters, 7u);
  EXPECT_EQ(ref->digest, ref->source_digest);
  EXPECT_EQ(ref->tokenizer_digest, DigestOf("{}"));
  EXPECT_THAT(ResolveModel(*ref, Cache()), IsOkAndHolds(model));
  Write("model/unrelated.txt", "notes do not change a model");
  EXPECT_THAT(ResolveModel(*ref, Cache()), IsOk());
  Write("model/tokenizer.json", "{ }");
  EXPECT_THAT(ResolveModel(*ref, Cache()), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("not the one")));
}

TEST_F(ImportTest, WrongModelsGiveASentenceThatNamesThem) {
  EXPECT_THAT(ImportModel((folder_ / "no").string(), Cache()), StatusIs(absl::StatusCode::kNotFound, HasSubstr("/no")));
  fs::path model = MakeFolder();
  Write("model/config.json", R"({"architectures": ["MambaForCausalLM"], "vocab_size": 10})");
  EXPECT_THAT(ImportModel(model.string(), Cache()),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("known: LlamaForCausalLM")));
  MakeFolder();
  fs::remove(model / "tokenizer.json");
  EXPECT_THAT(ImportModel(model.string(), Cache()), StatusIs(absl::StatusCode::kNotFound, HasSubstr("tokenizer.json")));
  std::string bytes = *ReadFile(kTiny);
  bytes.replace(bytes.find("llama"), 5, "mamba");
  EXPECT_THAT(ImportModel(Write("mamba.gguf", bytes).string(), Cache()),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("\"mamba\" is not supported (known: llama")));
}

TEST_F(ImportTest, ReferencesSurviveJson) {
  auto ref = ImportModel(kTiny.string(), Cache());
  ASSERT_THAT(ref, IsOk());
  auto again = ModelRefFromJson(json::parse(ToJson(*ref).dump()));
  ASSERT_THAT(again, IsOk());
  EXPECT_EQ(ToJson(*again), ToJson(*ref));
  EXPECT_EQ(again->uri, kTiny.string());
  json broken = ToJson(*ref);
  broken["digest"] = "sha256:1";
  EXPECT_THAT(ModelRefFromJson(broken), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("not a digest")));
  broken.erase("digest");
  EXPECT_THAT(ModelRefFromJson(broken), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("digest is not text")));
}

// A reference planned from one file must not pass for another one of the same size that has taken its place.
TEST_F(ImportTest, AFileReplacedByOneOfTheSameSizeIsNoticed) {
  std::string bytes = *ReadFile(kTiny);
  fs::path source = Write("copy.gguf", bytes);
  auto first = ImportModel(source.string(), Cache());
  ASSERT_THAT(first, IsOk());
  auto written = fs::last_write_time(source);
  bytes.back() = static_cast<char>(bytes.back() ^ 1);  // a weight
  Write("copy.gguf", bytes);
  fs::last_write_time(source, written);  // as tools do that keep times
  auto second = ImportModel(source.string(), Cache());
  ASSERT_THAT(second, IsOk());
  EXPECT_EQ(second->source_digest, DigestOf(bytes));
  EXPECT_NE(second->digest, first->digest);
}

// What a killed import left behind is cleared away by the next one.
TEST_F(ImportTest, RecoversFromAKilledImport) {
  auto ref = ImportModel(kTiny.string(), Cache());
  ASSERT_THAT(ref, IsOk());
  std::string name = ref->source_digest.substr(sizeof("sha256:") - 1) + "-v1";
  fs::remove_all(Cache() / "models" / name);
  Write(Join("cache/models/.", name, ".partial-1-1/model.safetensors"), "half");
  Write(Join("cache/models/", name, "/import.json"), "{\"uri\":");
  auto again = ImportModel(kTiny.string(), Cache());
  ASSERT_THAT(again, IsOk());
  EXPECT_EQ(again->digest, ref->digest);
  EXPECT_THAT(ModelFolder::Open(Cache() / "models" / name), IsOk());
  EXPECT_FALSE(fs::exists(Cache() / Join("models/.", name, ".partial-1-1")));
}

// The real model, where it is there: shapes, that an import takes seconds, that a second one agrees, and damage to it.
TEST_F(ImportTest, ImportsSmolLm2InSeconds) {
  const char* set = std::getenv("REFINERY_TEST_MODEL");
  const char* home = std::getenv("HOME");
  fs::path path = set != nullptr ? fs::path(set)
                                 : fs::path(home == nullptr ? "/" : home) /
                                       ".cache/refinery/models/SmolLM2-135M-Instruct.Q4_1.gguf";
  if (!fs::exists(path)) GTEST_SKIP() << "needs " << path;
  auto start = std::chrono::steady_clock::now();
  auto ref = ImportModel(path.string(), Cache());
  std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  ASSERT_THAT(ref, IsOk());
  EXPECT_EQ(ref->parameters, 134'515'008u);
  EXPECT_EQ(ref->vocab_size, 49'152u);
  EXPECT_LT(seconds.count(), 30) << "a few seconds on an idle machine";
  RecordProperty("import_milliseconds", static_cast<int>(seconds.count() * 1000));
  auto second = ImportModel(path.string(), folder_ / "other");
  ASSERT_THAT(second, IsOk());
  EXPECT_EQ(ToJson(*second), ToJson(*ref));

  fs::path cut = folder_ / "cut.gguf";
  fs::copy_file(path, cut);
  fs::resize_file(cut, fs::file_size(path) / 2);
  EXPECT_THAT(ImportModel(cut.string(), Cache()), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("cut.gguf")));
  fs::path damaged = folder_ / "damaged.gguf";
  fs::copy_file(path, damaged);
  std::fstream(damaged, std::ios::in | std::ios::out | std::ios::binary).seekp(24).write("\xff\xff\xff\xff\xff\xff", 6);
  EXPECT_THAT(ImportModel(damaged.string(), Cache()), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("damaged.gguf")));
}

}  // namespace
}  // namespace refinery::checkpoint
