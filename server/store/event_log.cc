#include "server/store/event_log.h"

#include <SQLiteCpp/SQLiteCpp.h>
#include <fcntl.h>
#include <sqlite3.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "common/files.h"

namespace refinery::store {
namespace {

constexpr int kSchemaVersion = 1;
constexpr int kCheckpointPages = 1024;  // 4 MiB of WAL between checkpoints

constexpr char kSchema[] = R"(
CREATE TABLE events(seq INTEGER PRIMARY KEY, job TEXT NOT NULL, time_ms INTEGER NOT NULL, payload BLOB NOT NULL) STRICT;
CREATE INDEX events_of_job ON events(job, seq);
CREATE TABLE results(task_digest TEXT PRIMARY KEY, output_digest TEXT NOT NULL, output_size INTEGER NOT NULL,
                     seq INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
INSERT INTO meta VALUES('clean', '1');
)";

// SQLite's errors as ours. The only place where SQLiteCpp's exceptions end.
Status FromSqlite(const SQLite::Exception& e, std::string_view doing) {
  const std::string text = Join("the event log cannot ", doing, ": ", e.what());
  switch (e.getErrorCode()) {
    case SQLITE_FULL:
      return ResourceExhausted(text, "; free space in the state folder");
    case SQLITE_CORRUPT:
    case SQLITE_NOTADB:
      return DataLoss(text, "; restore the state folder from a backup");
    default:
      return Unavailable(text);
  }
}

StatusOr<v1::Event> Parse(const SQLite::Column& column, int64_t seq) {
  v1::Event event;
  if (!event.ParseFromArray(column.getBlob(), column.getBytes()) || static_cast<int64_t>(event.seq()) != seq) {
    return DataLoss("event ", seq, " of the event log is damaged; restore the state folder from a backup");
  }
  return event;
}

}  // namespace

StatusOr<FolderLock> FolderLock::Take(const std::filesystem::path& folder) {
  RF_RETURN_IF_ERROR(CreateFolders(folder));
  const std::filesystem::path path = folder / "lock";
  const int fd = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  if (fd < 0) return Unavailable(path.string(), ": cannot be opened: ", std::strerror(errno));
  if (flock(fd, LOCK_EX | LOCK_NB) != 0) {
    char holder[32] = {};
    const ssize_t n = pread(fd, holder, sizeof(holder) - 1, 0);
    close(fd);
    return Unavailable(folder.string(), " is in use by another coordinator (process ",
                       n > 0 ? std::string_view(holder, n) : "unknown", "); stop it or give another --state folder");
  }
  const std::string pid = Join(getpid());
  if (ftruncate(fd, 0) != 0 || pwrite(fd, pid.data(), pid.size(), 0) < 0) {
    // Only the text for people is missing; the lock itself holds.
  }
  return FolderLock(fd);
}

FolderLock::FolderLock(FolderLock&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
FolderLock::~FolderLock() {
  if (fd_ >= 0) close(fd_);
}

struct EventLog::Impl {
  Impl(FolderLock folder_lock, const std::filesystem::path& path)
      : lock(std::move(folder_lock)), db(path.string(), SQLite::OPEN_READWRITE | SQLite::OPEN_CREATE, 5000) {}

  FolderLock lock;
  SQLite::Database db;
  std::unique_ptr<SQLite::Statement> insert_event;
  std::unique_ptr<SQLite::Statement> insert_result;
  std::unique_ptr<SQLite::Statement> read_job;
};

EventLog::EventLog() = default;

EventLog::~EventLog() {
  if (!impl_ || failed_) return;
  try {
    impl_->db.exec("UPDATE meta SET value = '1' WHERE key = 'clean'");
    impl_->db.exec("PRAGMA wal_checkpoint(TRUNCATE)");
  } catch (const SQLite::Exception&) {
    // The next start then checks the database, which is right.
  }
}

StatusOr<std::unique_ptr<EventLog>> EventLog::Open(const std::filesystem::path& folder) {
  RF_ASSIGN_OR_RETURN(FolderLock lock, FolderLock::Take(folder));
  std::unique_ptr<EventLog> log(new EventLog());
  try {
    log->impl_ = std::make_unique<Impl>(std::move(lock), folder / "refinery.db");
    log->failed_ = true;  // until it is known to be good: a failed Open must not mark a clean stop
    RF_RETURN_IF_ERROR(log->Initialize());
    log->failed_ = false;
  } catch (const SQLite::Exception& e) {
    return FromSqlite(e, "be opened");
  }
  return log;
}

Status EventLog::Initialize() {
  SQLite::Database& db = impl_->db;
  db.exec("PRAGMA journal_mode=WAL");
  db.exec("PRAGMA synchronous=FULL");
  db.exec("PRAGMA foreign_keys=ON");
  db.exec(Join("PRAGMA wal_autocheckpoint=", kCheckpointPages));
  RF_RETURN_IF_ERROR(Migrate());

  was_unclean_ = db.execAndGet("SELECT value FROM meta WHERE key = 'clean'").getString() != "1";
  if (was_unclean_) {
    const std::string verdict = db.execAndGet("PRAGMA integrity_check").getString();
    if (verdict != "ok") {
      return DataLoss("the event log did not survive the last stop: ", verdict, "; restore the state folder from a backup");
    }
  }
  db.exec("UPDATE meta SET value = '0' WHERE key = 'clean'");
  last_seq_ = db.execAndGet("SELECT coalesce(max(seq), 0) FROM events").getInt64();
  const int64_t count = db.execAndGet("SELECT count(*) FROM events").getInt64();
  if (static_cast<uint64_t>(count) != last_seq_) {
    return DataLoss("the event log has ", count, " events but ends at ", last_seq_, "; restore it from a backup");
  }
  impl_->insert_event = std::make_unique<SQLite::Statement>(db, "INSERT INTO events VALUES(?, ?, ?, ?)");
  impl_->insert_result = std::make_unique<SQLite::Statement>(db, "INSERT OR REPLACE INTO results VALUES(?, ?, ?, ?)");
  impl_->read_job = std::make_unique<SQLite::Statement>(
      db, "SELECT seq, payload FROM events WHERE job = ? AND seq > ? ORDER BY seq LIMIT ?");
  return absl::OkStatus();
}

Status EventLog::Migrate() {
  SQLite::Database& db = impl_->db;
  const int version = db.execAndGet("PRAGMA user_version").getInt();
  if (version > kSchemaVersion) {
    return DataLoss("the state folder was written by a newer refineryd (schema ", version, ", this one knows ",
                    kSchemaVersion, "); start that version");
  }
  if (version == kSchemaVersion) return absl::OkStatus();
  SQLite::Transaction transaction(db, SQLite::TransactionBehavior::IMMEDIATE);
  db.exec(kSchema);
  db.exec(Join("PRAGMA user_version=", kSchemaVersion));
  transaction.commit();
  return absl::OkStatus();
}

Status EventLog::Append(const std::vector<v1::Event>& events) {
  if (events.empty()) return absl::OkStatus();
  uint64_t seq = last_seq_;
  try {
    SQLite::Transaction transaction(impl_->db, SQLite::TransactionBehavior::IMMEDIATE);
    for (const v1::Event& event : events) {
      if (event.seq() != ++seq) return Internal("event ", event.seq(), " does not follow event ", seq - 1);
      const std::string payload = event.SerializeAsString();
      SQLite::Statement& insert = *impl_->insert_event;
      insert.reset();
      insert.bind(1, static_cast<int64_t>(event.seq()));
      insert.bind(2, event.job());
      insert.bind(3, static_cast<int64_t>(event.time_ms()));
      insert.bind(4, payload.data(), static_cast<int>(payload.size()));
      insert.exec();
      if (!event.has_task_finished() || event.task_finished().task_digest().empty()) continue;
      SQLite::Statement& result = *impl_->insert_result;
      result.reset();
      result.bind(1, event.task_finished().task_digest());
      result.bind(2, event.task_finished().output().digest());
      result.bind(3, static_cast<int64_t>(event.task_finished().output().size()));
      result.bind(4, static_cast<int64_t>(event.seq()));
      result.exec();
    }
    transaction.commit();
  } catch (const SQLite::Exception& e) {
    failed_ = true;
    return FromSqlite(e, "be written");
  }
  last_seq_ = seq;
  return absl::OkStatus();
}

Status EventLog::Replay(const std::function<Status(v1::Event)>& visit) try {
  SQLite::Statement select(impl_->db, "SELECT seq, payload FROM events ORDER BY seq");
  while (select.executeStep()) {
    RF_ASSIGN_OR_RETURN(v1::Event event, Parse(select.getColumn(1), select.getColumn(0).getInt64()));
    RF_RETURN_IF_ERROR(visit(std::move(event)));
  }
  return absl::OkStatus();
} catch (const SQLite::Exception& e) {
  return FromSqlite(e, "be read");
}

StatusOr<std::vector<v1::Event>> EventLog::Read(const std::string& job, uint64_t after_seq, int limit) try {
  std::vector<v1::Event> events;
  SQLite::Statement& select = *impl_->read_job;
  select.reset();
  select.bind(1, job);
  select.bind(2, static_cast<int64_t>(after_seq));
  select.bind(3, limit);
  while (select.executeStep()) {
    RF_ASSIGN_OR_RETURN(v1::Event event, Parse(select.getColumn(1), select.getColumn(0).getInt64()));
    events.push_back(std::move(event));
  }
  select.reset();  // ends the read transaction, which would hold checkpoints back
  return events;
} catch (const SQLite::Exception& e) {
  return FromSqlite(e, "be read");
}

StatusOr<std::string> EventLog::ResultOf(const std::string& task_digest) try {
  SQLite::Statement select(impl_->db, "SELECT output_digest FROM results WHERE task_digest = ?");
  select.bind(1, task_digest);
  if (!select.executeStep()) return NotFound("no task with identity ", task_digest, " was finished");
  return select.getColumn(0).getString();
} catch (const SQLite::Exception& e) {
  return FromSqlite(e, "be read");
}

}  // namespace refinery::store
