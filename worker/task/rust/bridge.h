// worker/task/rust/bridge.h
//
// The C interface to the Rust crates `tokenizers` (Hugging Face), `minijinja` (chat templates) and `llguidance`
// (constrained decoding), and to readers of Parquet, Arrow, CSV and JSON. Only worker/task/tokenizer and
// worker/task/data/table.cc use it; everything else uses the C++ classes there.
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
typedef struct RbConstraintFactory RbConstraintFactory;
typedef struct RbConstraint RbConstraint;

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
// The same for prompts: no white space is trimmed, and a variable that is not there is an error.
int RbTemplateNewPlain(RbText source, RbTemplate** out, RbString* error);
void RbTemplateFree(RbTemplate* chat_template);
// Renders with the variables of a JSON object. strftime_now formats `now_seconds` since 1970 in UTC.
int RbTemplateRender(const RbTemplate* chat_template, RbText context_json, int64_t now_seconds, RbString* out,
                     RbString* error);

// What constraints of one tokenizer share: the bytes of its tokens as a tree. `end_ids` end a text (at least one). Masks
// cover max(vocab_size, the tokenizer's ids) tokens; ids without a token are never allowed.
int RbConstraintFactoryNew(const RbTokenizer* tokenizer, const uint32_t* end_ids, size_t end_count, size_t vocab_size,
                           RbConstraintFactory** out, RbString* error);
void RbConstraintFactoryFree(RbConstraintFactory* factory);
// Tokens that masks cover; 0 after a panic.
size_t RbConstraintFactoryVocabSize(const RbConstraintFactory* factory);
enum { kRbJsonSchema = 0, kRbRegex = 1, kRbLark = 2 };
// A constraint lives on after its factory is freed.
int RbConstraintNew(const RbConstraintFactory* factory, int kind, RbText source, RbConstraint** out, RbString* error);
void RbConstraintFree(RbConstraint* constraint);
// Fills `words` with the tokens that may come next: bit t % 32 of word t / 32.
int RbConstraintMask(RbConstraint* constraint, uint32_t* words, size_t word_count, RbString* error);
// Appends a token. One that is not allowed is an error and changes nothing.
int RbConstraintAccept(RbConstraint* constraint, uint32_t token, RbString* error);
// Whether nothing but the end may follow (also after an end token or a failure).
bool RbConstraintFinished(const RbConstraint* constraint);
// Whether the text so far is complete.
bool RbConstraintCanStop(RbConstraint* constraint);

// A data file as JSON lines: Parquet, Arrow (file or stream), CSV, a JSON list or JSONL, told apart by content and extension.
// `columns`: names separated by line breaks, empty for all. Errors name the row and the column, not the file.
typedef struct RbTable RbTable;
int RbTableOpen(RbText path, RbText columns, RbTable** out, RbString* error);
// The next rows, each a JSON object and a line break; empty at the end. Memory follows the batch, not the file.
int RbTableNext(RbTable* table, RbString* rows, RbString* error);
void RbTableFree(RbTable* table);

#ifdef __cplusplus
}  // extern "C"
#endif
