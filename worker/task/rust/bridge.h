// worker/task/rust/bridge.h
//
// The C interface to the Rust crates `tokenizers` (Hugging Face) and `minijinja` (chat templates). Only
// worker/task/tokenizer uses it; everything else uses the C++ class there.
//
// Text is UTF-8 with an explicit length, never NUL-terminated. Functions that can fail return 0 on success; otherwise
// they return 1, fill `error` with one sentence and leave the outputs empty. A Rust panic is such an error: nothing
// unwinds into C++. Outputs belong to the caller, who frees them with the function of the same type.
// Threads: functions that take a const object may run concurrently on it.

#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct RbTokenizer RbTokenizer;
typedef struct RbTemplate RbTemplate;

typedef struct RbText {
  const char* data;
  size_t size;
} RbText;

typedef struct RbString {  // owned; {NULL, 0, 0} is empty
  char* data;
  size_t size;
  size_t capacity;
} RbString;

typedef struct RbIds {  // owned; {NULL, 0, 0} is empty
  uint32_t* data;
  size_t size;
  size_t capacity;
} RbIds;

void RbStringFree(RbString* string);
void RbIdsFree(RbIds* ids);

// From the text of a tokenizer.json. Its truncation and padding settings are dropped, as calling a Hugging Face
// tokenizer without arguments does.
int RbTokenizerNew(RbText json, RbTokenizer** out, RbString* error);
void RbTokenizerFree(RbTokenizer* tokenizer);
// Replaces the post-processor by one that puts `bos` before and `eos` after a text, each where its size is not 0.
// The tokens must be known.
int RbTokenizerSetBosEos(RbTokenizer* tokenizer, RbText bos, RbText eos, RbString* error);
int RbTokenizerEncode(const RbTokenizer* tokenizer, RbText text, bool add_special_tokens, RbIds* out, RbString* error);
int RbTokenizerDecode(const RbTokenizer* tokenizer, const uint32_t* ids, size_t count, bool skip_special_tokens,
                      RbString* out, RbString* error);
// Size including added tokens; 0 after a panic.
size_t RbTokenizerVocabSize(const RbTokenizer* tokenizer);
// The id of a token, or -1.
int64_t RbTokenizerTokenToId(const RbTokenizer* tokenizer, RbText token);

// Compiles a Jinja template with the settings of transformers' apply_chat_template: trim_blocks, lstrip_blocks, loop
// controls, Python's string methods, tojson without HTML escapes, raise_exception, strftime_now, generation blocks.
int RbTemplateNew(RbText source, RbTemplate** out, RbString* error);
void RbTemplateFree(RbTemplate* chat_template);
// Renders with the variables of a JSON object. strftime_now formats `now_seconds` since 1970 in UTC.
int RbTemplateRender(const RbTemplate* chat_template, RbText context_json, int64_t now_seconds, RbString* out,
                     RbString* error);

#ifdef __cplusplus
}  // extern "C"
#endif
