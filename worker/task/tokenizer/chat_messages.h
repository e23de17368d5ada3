// worker/task/tokenizer/chat_messages.h
//
// What transformers' apply_chat_template does with messages before a template sees them and with the text afterwards.
//
// Source: transformers 5.23, utils/chat_template_utils.py (render_jinja_template).
// Errors: INVALID_ARGUMENT naming the message.  Threads: pure functions.

#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "common/status.h"

namespace refinery::tokenizer {

// `messages` (a list of objects) as the template sees them: reasoning stands under each name that templates read
// ("reasoning_content", "thinking"); with `continue_final` a tag ends the last message's content.
StatusOr<nlohmann::ordered_json> TemplateMessages(const nlohmann::ordered_json& messages, bool continue_final);

// The rendered text up to the tag: the last message stays open for the model to go on with.
StatusOr<std::string> CutAtFinalMessage(std::string rendered, const nlohmann::ordered_json& messages);

}  // namespace refinery::tokenizer
