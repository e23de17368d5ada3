// tokenizer.json: loads it as a model folder's, encodes and decodes.
#include "tests/fuzz/fuzz_target.h"
#include "worker/task/tokenizer/tokenizer.h"

namespace refinery::fuzz {

const char kFormat[] = "tokenizer";
const TextKind kTextKind = TextKind::kJson;

namespace {

const char kAdded[] =
    R"({"version":"1.0","truncation":{"max_length":512,"stride":0,"strategy":"LongestFirst","direction":"Right"},"padding":null,)"
    R"("added_tokens":[{"id":3,"content":"<s>","single_word":false,"lstrip":false,"rstrip":true,"normalized":false,"special":true}],)";

}  // namespace

std::vector<Seed> Seeds() {
  const std::string head = kAdded;
  return {
      {.name = "byte-level", .bytes = head + R"("normalizer":{"type":"NFC"},"pre_tokenizer":{"type":"Sequence","pretokenizers":[)"
       R"({"type":"Split","pattern":{"Regex":"(?i:'s|'t)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|\\s+(?!\\S)|\\s+"},"behavior":"Isolated","invert":false},)"
       R"({"type":"Digits","individual_digits":true},{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":false}]},)"
       R"("post_processor":{"type":"TemplateProcessing","single":[{"SpecialToken":{"id":"<s>","type_id":0}},{"Sequence":{"id":"A","type_id":0}}],)"
       R"("pair":[{"Sequence":{"id":"A","type_id":0}},{"Sequence":{"id":"B","type_id":1}}],"special_tokens":{"<s>":{"id":"<s>","ids":[3],"tokens":["<s>"]}}},)"
       R"("decoder":{"type":"ByteLevel"},"model":{"type":"BPE","dropout":null,"unk_token":null,"fuse_unk":false,"byte_fallback":false,)"
       R"("ignore_merges":true,"vocab":{"a":0,"b":1,"ab":2},"merges":[["a","b"]]}})"},
      {.name = "sentencepiece", .bytes = head + R"("normalizer":{"type":"Sequence","normalizers":[{"type":"Prepend","prepend":"_"},)"
       R"({"type":"Replace","pattern":{"String":" "},"content":"_"},{"type":"Lowercase"},{"type":"Strip","strip_left":true,"strip_right":true}]},)"
       R"("pre_tokenizer":{"type":"Metaspace","replacement":"_","prepend_scheme":"always","split":false},"post_processor":null,)"
       R"("decoder":{"type":"Sequence","decoders":[{"type":"Replace","pattern":{"String":"_"},"content":" "},{"type":"ByteFallback"},{"type":"Fuse"},)"
       R"({"type":"Strip","content":" ","start":1,"stop":0}]},"model":{"type":"BPE","unk_token":"<unk>","byte_fallback":true,)"
       R"("vocab":{"<unk>":0,"<0x61>":1,"_":2,"a":4},"merges":["_ a"]}})"},
      {.name = "unigram", .bytes = head + R"("normalizer":{"type":"BertNormalizer","clean_text":true,"handle_chinese_chars":true,"strip_accents":null,"lowercase":true},)"
       R"("pre_tokenizer":{"type":"BertPreTokenizer"},"post_processor":{"type":"BertProcessing","sep":["<s>",3],"cls":["<s>",3]},)"
       R"("decoder":{"type":"WordPiece","prefix":"##","cleanup":true},"model":{"type":"Unigram","unk_id":0,"vocab":[["<unk>",0.0],["a",-1.5],["b",-2.0]],"byte_fallback":false}})"},
      {.name = "wordpiece", .bytes = head + R"("normalizer":null,"pre_tokenizer":{"type":"Whitespace"},"post_processor":)"
       R"({"type":"RobertaProcessing","sep":["<s>",3],"cls":["<s>",3],"trim_offsets":true,"add_prefix_space":false},"decoder":{"type":"CTC","pad_token":"a","word_delimiter_token":"|","cleanup":true},)"
       R"("model":{"type":"WordPiece","unk_token":"<unk>","continuing_subword_prefix":"##","max_input_chars_per_word":100,"vocab":{"<unk>":0,"a":1,"##b":2}}})"}};
}

}  // namespace refinery::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace refinery;
  const std::filesystem::path folder = fuzz::InputFile(data, size, "tokenizer.json").parent_path();
  auto tokenizer = tokenizer::Tokenizer::Load(folder);
  if (!tokenizer.ok()) return 0;
  ++fuzz::inputs_read;
  const std::string texts[] = {"", "a b ab <s> A\xcc\x8a\xf0\x9f\x98\x80\r\n 1234", std::string(300, 'a') + "!", std::string(200, ' ') + "b"};
  for (const std::string& text : texts) {
    auto ids = (*tokenizer)->Encode(text);
    if (ids.ok()) (void)(*tokenizer)->Decode(*ids);
  }
  (void)(*tokenizer)->Decode({0, 1, 3, 2'000'000'000});
  (void)(*tokenizer)->vocab_size();
  return 0;
}
