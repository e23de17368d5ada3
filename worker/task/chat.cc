#include "worker/task/runtime/torch.h"
// The precompiled header comes first.
#include "worker/task/chat.h"

#include <poll.h>
#include <signal.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <random>

#include "common/files.h"
#include "worker/task/chat_session.h"
#include "worker/task/checkpoint/import.h"
#include "worker/task/checkpoint/model_folder.h"
#include "worker/task/checkpoint/peft_adapter.h"
#include "worker/task/runtime/device.h"
#include "worker/task/start.h"

namespace refinery::task {
namespace {

constexpr int kInterruptedCode = 130;
constexpr int kLookMilliseconds = 100;
constexpr uint64_t kMaxSchemaBytes = 1 << 20;
constexpr double kUsualTemperature = 0.7, kUsualTopP = 0.95;

constexpr char kHelp[] =
    "/clear          forget the conversation (the system prompt stays)\n"
    "/system [TEXT]  set the system prompt, or show it; /system - takes it away\n"
    "/save FILE      write the conversation as JSON\n"
    "/help           this list\n"
    "/exit           leave (also Ctrl-D)\n"
    "A line that ends with \\ goes on in the next; \"\"\" begins and ends a message of several lines.\n"
    "Ctrl-C stops an answer.\n";

volatile sig_atomic_t g_interrupts = 0;

// No SA_RESTART: reading a line must return.
void CatchInterrupts() {
  struct sigaction action {};
  action.sa_handler = [](int) { g_interrupts = g_interrupts + 1; };
  sigaction(SIGINT, &action, nullptr);
}

template <typename T>
T FromConfig(const nlohmann::json& config, const char* key, T otherwise) {
  const auto found = config.find(key);
  return found != config.end() && found->is_number() ? found->get<T>() : otherwise;
}

// Flags before generation_config.json before our own.
StatusOr<generate::SamplingSettings> Sampling(const ChatOptions& options, const std::filesystem::path& folder) {
  const StatusOr<std::string> text = ReadFile(folder / "generation_config.json", kMaxSchemaBytes);
  nlohmann::json config = text.ok() ? nlohmann::json::parse(*text, nullptr, /*allow_exceptions=*/false) : nlohmann::json::object();
  if (!config.is_object()) config = nlohmann::json::object();
  generate::SamplingSettings s{
      .temperature = options.temperature.value_or(FromConfig(config, "temperature", kUsualTemperature)),
      .top_p = options.top_p.value_or(FromConfig(config, "top_p", kUsualTopP)),
      .top_k = options.top_k.value_or(FromConfig(config, "top_k", int64_t{0})),
      .repetition_penalty = options.repetition_penalty.value_or(FromConfig(config, "repetition_penalty", 1.0)),
      .min_p = options.min_p.value_or(FromConfig(config, "min_p", 0.0)),
      .presence_penalty = options.presence_penalty.value_or(0),
      .frequency_penalty = options.frequency_penalty.value_or(0)};
  RF_RETURN_IF_ERROR(generate::CheckSampling(s));
  return s;
}

StatusOr<std::unique_ptr<ChatSession>> Open(const ChatOptions& options, ChatSettings settings) {
  const std::string cache = CacheFolder(options.cache);
  RF_ASSIGN_OR_RETURN(const checkpoint::ModelRef ref, checkpoint::ImportModel(options.model, cache));
  RF_ASSIGN_OR_RETURN(const std::filesystem::path path, checkpoint::ResolveModel(ref, cache));
  RF_ASSIGN_OR_RETURN(settings.sampling, Sampling(options, path));
  RF_ASSIGN_OR_RETURN(const auto folder, checkpoint::ModelFolder::Open(path));
  RF_ASSIGN_OR_RETURN(const auto tokenizer, tokenizer::Tokenizer::Load(path));
  const at::ScalarType dtype = options.dtype == "float32" ? at::kFloat : at::kBFloat16;
  RF_ASSIGN_OR_RETURN(const std::shared_ptr<model::CausalLm> lm,
                      model::CausalLm::Load(*folder, {.dtype = dtype, .device = runtime::DefaultDevice(), .keep_packed = true}));
  for (const std::string& adapter : options.adapters) {
    RF_ASSIGN_OR_RETURN(const checkpoint::PeftAdapter lora, checkpoint::LoadPeftAdapter(adapter));
    RF_RETURN_IF_ERROR(lm->MergeAdapter(lora));
  }
  auto session = std::make_unique<ChatSession>(lm, tokenizer, std::move(settings));
  session->SetSystem(options.system);
  return session;
}

// A model's text may hold escape sequences; a terminal must not follow them.
std::string Printable(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (static_cast<unsigned char>(c) >= 0x20 || c == '\n' || c == '\t') out += c;
  }
  return out;
}

class Terminal {
 public:
  Terminal(ChatSession& session, const ChatOptions& options)
      : session_(session), verbose_(options.verbose), out_is_terminal_(::isatty(STDOUT_FILENO) != 0) {
    color_ = out_is_terminal_ && std::getenv("NO_COLOR") == nullptr;
  }

  // Prints the answer to a message as it comes. The exit code after Ctrl-C, else 0.
  StatusOr<int> Answer(const std::string& message) {
    g_interrupts = 0;
    char last = '\n';
    const auto on_text = [&](const std::string& text) {
      const std::string shown = out_is_terminal_ ? Printable(text) : text;
      std::fwrite(shown.data(), 1, shown.size(), stdout);
      std::fflush(stdout);
      if (!shown.empty()) last = shown.back();
    };
    StatusOr<task::Answer> answer = session_.Ask(message, on_text, [] { return g_interrupts > 0; });
    RF_RETURN_IF_ERROR(answer.status());
    if (last != '\n' || answer->text.empty()) std::fputc('\n', stdout);
    std::fflush(stdout);
    Remark(*answer);
    return answer->finish_reason == "cancelled" ? kInterruptedCode : 0;
  }

  // Until the end of the input, /exit or a second Ctrl-C.
  int Converse() {
    if (!session_.has_template())
      std::fprintf(stderr, "This model has no chat template: it continues the text as it stands.\n");
    bool warned = false;
    for (;;) {
      g_interrupts = 0;
      StatusOr<std::string> message = ReadMessage();
      if (absl::IsCancelled(message.status())) {
        if (warned) return kInterruptedCode;
        warned = true;
        std::fprintf(stderr, "\nCtrl-C once more, Ctrl-D or /exit leaves.\n");
        continue;
      }
      if (!message.ok()) return 0;  // the end of the input
      warned = false;
      if (message->empty()) continue;
      if (message->front() == '/') {
        if (!Command(*message)) return 0;
        continue;
      }
      const StatusOr<int> code = Answer(*message);
      if (code.ok()) {
        warned = *code != 0;  // a second Ctrl-C, at the prompt, leaves
        continue;
      }
      std::fprintf(stderr, "[%s]\n", Message(code.status()).c_str());
    }
  }

 private:
  void Remark(const task::Answer& answer) {
    if (answer.context_full)
      std::fprintf(stderr, "[the context of %lld tokens is full: /clear begins a new conversation]\n",
                   static_cast<long long>(session_.context()));
    else if (answer.finish_reason == "length")
      std::fprintf(stderr, "[cut after %lld tokens: see --max-new-tokens]\n", static_cast<long long>(answer.tokens));
    else if (answer.finish_reason == "cancelled")
      std::fprintf(stderr, "[stopped]\n");
    if (!verbose_) return;
    const auto rate = [](int64_t tokens, double seconds) { return static_cast<double>(tokens) / std::max(seconds, 1e-6); };
    std::fprintf(stderr, "[prompt %lld tokens, %lld computed in %.2f s; answer %lld tokens, %.1f tokens/s]\n",
                 static_cast<long long>(answer.prompt_tokens), static_cast<long long>(answer.computed_tokens),
                 answer.prompt_seconds, static_cast<long long>(answer.tokens),
                 rate(std::max<int64_t>(0, answer.tokens - 1), answer.answer_seconds));
  }

  // CANCELLED after Ctrl-C, OUT_OF_RANGE at the end of the input.
  StatusOr<std::string> ReadLine(const char* prompt) {
    std::printf(color_ ? "\033[1m%s\033[0m" : "%s", prompt);
    std::fflush(stdout);
    // A signal that comes before getline waits would be lost: look again and again until there is a line.
    pollfd input{.fd = STDIN_FILENO, .events = POLLIN, .revents = 0};
    while (g_interrupts == 0 && ::poll(&input, 1, kLookMilliseconds) <= 0) {
    }
    if (g_interrupts > 0) return Cancelled("interrupted");
    char* buffer = nullptr;
    size_t size = 0;
    errno = 0;
    const ssize_t length = ::getline(&buffer, &size, stdin);
    std::string line(buffer == nullptr || length < 0 ? "" : buffer);
    std::free(buffer);
    if (length < 0 && errno == EINTR) {
      std::clearerr(stdin);
      return Cancelled("interrupted");
    }
    if (length < 0) {
      std::printf("\n");
      return OutOfRange("end of input");
    }
    while (!line.empty() && (line.back() == '\n' || line.back() == '\r')) line.pop_back();
    return line;
  }

  StatusOr<std::string> ReadMessage() {
    RF_ASSIGN_OR_RETURN(std::string message, ReadLine("> "));
    if (message.starts_with("\"\"\"")) {
      message.erase(0, 3);
      while (!message.ends_with("\"\"\"")) {
        RF_ASSIGN_OR_RETURN(const std::string line, ReadLine(". "));
        message += (message.empty() ? "" : "\n") + line;
      }
      message.resize(message.size() - 3);
      return message;
    }
    while (message.ends_with('\\')) {
      message.back() = '\n';
      RF_ASSIGN_OR_RETURN(const std::string line, ReadLine(". "));
      message += line;
    }
    return message;
  }

  // False = leave.
  bool Command(const std::string& line) {
    const size_t space = line.find(' ');
    const std::string name = line.substr(0, space);
    const size_t begin = space == std::string::npos ? space : line.find_first_not_of(' ', space);
    const std::string argument = begin == std::string::npos ? "" : line.substr(begin);
    if (name == "/exit" || name == "/quit") return false;
    if (name == "/help") {
      std::fputs(kHelp, stderr);
    } else if (name == "/clear") {
      session_.Clear();
      std::fprintf(stderr, "[a new conversation]\n");
    } else if (name == "/system") {
      if (argument == "-") session_.SetSystem("");
      else if (!argument.empty()) session_.SetSystem(argument);
      std::fprintf(stderr, "[system prompt: %s]\n", session_.system().empty() ? "none" : session_.system().c_str());
    } else if (name == "/save") {
      const Status saved = Save(argument);
      std::fprintf(stderr, "[%s]\n", saved.ok() ? Join("saved to ", argument).c_str() : Message(saved).c_str());
    } else {
      std::fprintf(stderr, "[%s is no command; /help lists them]\n", name.c_str());
    }
    return true;
  }

  Status Save(const std::string& file) const {
    if (file.empty()) return InvalidArgument("/save needs the name of a file");
    nlohmann::ordered_json list = nlohmann::ordered_json::array();
    for (const tokenizer::ChatMessage& m : session_.Messages()) list.push_back({{"role", m.role}, {"content", m.content}});
    return WriteFileAtomically(file, list.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n");
  }

  ChatSession& session_;
  const bool verbose_, out_is_terminal_;
  bool color_ = false;
};

StatusOr<std::string> ReadInput() {
  std::string text;
  char buffer[1 << 16];
  for (size_t count; (count = std::fread(buffer, 1, sizeof(buffer), stdin)) > 0;) text.append(buffer, count);
  while (!text.empty() && (text.back() == '\n' || text.back() == '\r')) text.pop_back();
  if (text.empty()) return InvalidArgument("standard input is empty; write a message to it, or use --prompt TEXT");
  return text;
}

}  // namespace

StatusOr<int> Chat(const ChatOptions& options) {
  c10::InferenceMode inference;
  const bool interactive = !options.prompt && ::isatty(STDIN_FILENO) != 0;
  std::string message = options.prompt.value_or("");
  if (!interactive && !options.prompt) {
    RF_ASSIGN_OR_RETURN(message, ReadInput());
  }
  ChatSettings settings{.seed = options.seed ? *options.seed : std::random_device()(),
                        .max_new_tokens = options.max_new_tokens,
                        .context = options.context,
                        .memory_budget = options.memory_mib << 20};
  if (!options.json_schema.empty()) {
    RF_ASSIGN_OR_RETURN(settings.json_schema, ReadFile(options.json_schema, kMaxSchemaBytes));
  }
  runtime::SetThreads(options.threads);
  if (interactive) std::fprintf(stderr, "loading %s ...\n", options.model.c_str());
  RF_ASSIGN_OR_RETURN(const std::unique_ptr<ChatSession> session, Open(options, std::move(settings)));
  CatchInterrupts();
  Terminal terminal(*session, options);
  if (!interactive) return terminal.Answer(message);
  std::fprintf(stderr, "%s on %s, context %lld tokens. /help lists the commands, /exit leaves.\n", options.dtype.c_str(),
               runtime::DescribeDevice(runtime::DefaultDevice()).c_str(), static_cast<long long>(session->context()));
  return terminal.Converse();
}

}  // namespace refinery::task
