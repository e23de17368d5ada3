// worker/task/tokenizer/bridge_text.h
//
// Texts and id lists on their way through worker/task/rust/bridge.h: what the bridge gives out is freed when it goes out
// of scope. For the sources of this folder alone.

#pragma once

#include <string>
#include <string_view>

#include "worker/task/rust/bridge.h"

namespace refinery::tokenizer {

inline RbText TextOf(std::string_view text) { return {text.data(), text.size()}; }

struct OwnedString : RbString {
  OwnedString() : RbString{nullptr, 0, 0} {}
  ~OwnedString() { RbStringFree(this); }
  OwnedString(const OwnedString&) = delete;
  OwnedString& operator=(const OwnedString&) = delete;
  std::string Take() const { return data == nullptr ? std::string() : std::string(data, size); }
};

struct OwnedIds : RbIds {
  OwnedIds() : RbIds{nullptr, 0, 0} {}
  ~OwnedIds() { RbIdsFree(this); }
  OwnedIds(const OwnedIds&) = delete;
  OwnedIds& operator=(const OwnedIds&) = delete;
};

}  // namespace refinery::tokenizer
