#include "client/render/progress_view.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>

#include "client/render/job_text.h"
#include "client/render/terminal.h"
#include "common/status.h"

namespace refinery::client {
namespace {

constexpr std::chrono::seconds kPlainInterval{15};
constexpr int kMaxTaskLines = 6;

void Write(int fd, const std::string& text) {
  size_t done = 0;
  while (done < text.size()) {
    ssize_t written = ::write(fd, text.data() + done, text.size() - done);
    if (written <= 0) return;   // the terminal is gone; the job goes on
    done += static_cast<size_t>(written);
  }
}

std::string Fixed(double value, int digits) {
  char text[40];
  std::snprintf(text, sizeof(text), "%.*f", digits, value);
  return text;
}

// Cuts a line to `width` columns without cutting a UTF-8 character.
std::string Fit(const std::string& line, int width) {
  size_t bytes = 0;
  for (int columns = 0; bytes < line.size(); ++bytes) {
    bool first = (static_cast<unsigned char>(line[bytes]) & 0xc0) != 0x80;
    if (first && columns++ >= width) break;
  }
  return line.substr(0, bytes);
}

}  // namespace

ProgressView::ProgressView(int fd) : fd_(fd), live_(IsTerminal(fd)), started_(Clock::now()), last_plain_(Clock::now()) {}

ProgressView::~ProgressView() { Clear(); }

void ProgressView::SetJob(const v1::Job& job) { job_ = job; }

double ProgressView::Elapsed() const { return std::chrono::duration<double>(Clock::now() - started_).count(); }

void ProgressView::OnEvent(const v1::Event& event) {
  std::string text = EventText(event);
  // On a terminal the picture shows what runs; only what stays worth reading goes above it.
  bool routine = event.kind_case() == v1::Event::kTaskLeased;
  if (text.empty() || (live_ && routine)) return;
  Print(text);
}

void ProgressView::OnProgress(const v1::WatchJobResponse::Progress& progress) {
  const v1::TaskProgress& now = progress.progress();
  PhaseStart& start = phases_[progress.path()];
  const bool begins = start.time == Clock::time_point() || start.phase != now.phase() || now.done() < start.done;
  if (begins) start = {.phase = now.phase(), .done = now.done(), .time = Clock::now()};
  for (v1::Task& task : *job_.mutable_tasks()) {
    if (task.path() == progress.path()) *task.mutable_progress() = progress.progress();
  }
}

void ProgressView::Note(const std::string& text) { Print(text); }

void ProgressView::SetWaiting(const std::string& reason) {
  if (!live_ && !reason.empty() && reason != waiting_) Print(reason);
  waiting_ = reason;
}

void ProgressView::Print(const std::string& line) {
  Clear();
  Write(fd_, Join("[", DurationText(Elapsed()), "] ", line, "\n"));
}

std::map<std::string, double> ProgressView::PhaseSecondsLeft() const {
  std::map<std::string, double> left;
  for (const v1::Task& task : job_.tasks()) {
    const auto start = phases_.find(task.path());
    const v1::TaskProgress& now = task.progress();
    if (start == phases_.end() || now.done() <= start->second.done || now.total() < now.done()) continue;
    const double elapsed = std::chrono::duration<double>(Clock::now() - start->second.time).count();
    left[task.path()] = elapsed * (now.total() - now.done()) / (now.done() - start->second.done);
  }
  return left;
}

std::string ProgressView::TaskLine(const v1::Task& task) const {
  const v1::TaskProgress& progress = task.progress();
  std::string line = Join("  ", KindName(task.kind()), "  ", task.path());
  if (!progress.phase().empty()) line += Join("  ", Printable(progress.phase()));
  if (progress.total() > 0) {
    line += Join("  ", Fixed(progress.done(), 0), "/", Fixed(progress.total(), 0), " (",
                 Fixed(100 * progress.done() / progress.total(), 0), " %)");
  }
  if (progress.loss() != 0) line += Join("  loss ", Fixed(progress.loss(), 4));
  if (progress.tokens_per_second() > 0) line += Join("  ", Fixed(progress.tokens_per_second(), 0), " tokens/s");
  if (task.attempt() > 1) line += Join("  attempt ", task.attempt());
  return line;
}

std::vector<std::string> ProgressView::Lines() const {
  std::optional<double> left = SecondsLeft(job_, PhaseSecondsLeft());
  std::string head = Join("job ", job_.id(), " (", job_.recipe().name(), ")  ", StateName(job_.state()), "  ",
                          job_.tasks_done(), "/", job_.tasks_total(), " tasks  ", DurationText(Elapsed()));
  head += left.has_value() ? Join("  about ", DurationText(*left), " left") : "  time left unknown";
  std::vector<std::string> lines = {head};
  if (!waiting_.empty()) lines.push_back("  " + waiting_);
  int shown = 0;
  int running = 0;
  for (const v1::Task& task : job_.tasks()) {
    if (task.state() != v1::Task::LEASED) continue;
    ++running;
    if (shown < kMaxTaskLines) {
      lines.push_back(TaskLine(task));
      ++shown;
    }
  }
  if (running > shown) lines.push_back(Join("  and ", running - shown, " more"));
  const v1::Trial* best = nullptr;
  for (const v1::Trial& trial : job_.trials()) {
    if (trial.state() != v1::Trial::SUCCEEDED) continue;
    if (best == nullptr || trial.mean() < best->mean()) best = &trial;
  }
  if (best != nullptr)
    lines.push_back(Join("  best so far: trial ", best->index(), ", loss ", Fixed(best->mean(), 4), " (",
                         SettingsText(best->settings()), ")"));
  return lines;
}

void ProgressView::Tick() {
  if (job_.id().empty()) return;
  if (!live_) {
    if (Clock::now() - last_plain_ < kPlainInterval) return;
    last_plain_ = Clock::now();
    for (const std::string& line : Lines()) Print(line);
    return;
  }
  Clear();
  std::string text;
  bool color = WantsColor(fd_);
  int width = TerminalWidth(fd_) - 1;
  std::vector<std::string> lines = Lines();
  for (size_t i = 0; i < lines.size(); ++i)
    text += Paint(Fit(lines[i], width), i == 0 ? Color::kBold : Color::kPlain, color) + "\n";
  drawn_lines_ = static_cast<int>(lines.size());
  Write(fd_, text);
}

void ProgressView::Clear() {
  if (drawn_lines_ == 0) return;
  Write(fd_, Join("\033[", drawn_lines_, "A\033[J"));
  drawn_lines_ = 0;
}

}  // namespace refinery::client
