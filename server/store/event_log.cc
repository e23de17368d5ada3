#include "server/store/event_log.h"

#include <SQLiteCpp/Backup.h>
#include <SQLiteCpp/SQLiteCpp.h>
#include <fcntl.h>
#include <sqlite3.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "common/files.h"
#include "server/store/failpoint.h"

namespace refinery::store {
namespace {

constexpr int kSchemaVersion = 3;
constexpr int kBusyMs = 5000;
constexpr char kDamagedFile[] = "damaged_log";
constexpr int kCheckpointPages = 4096;                    // 16 MiB of WAL between checkpoints
constexpr size_t kTriedBytes = 256 << 10;                 // of TryWriting
constexpr uint64_t kCheckAtOnceBytes = uint64_t{64} << 20;  // a check of this much takes a moment

constexpr char kSchema[] = R"(
CREATE TABLE events(seq INTEGER PRIMARY KEY, job TEXT NOT NULL, time_ms INTEGER NOT NULL, payload BLOB NOT NULL) STRICT;
CREATE INDEX events_of_job ON events(job, seq);
CREATE TABLE results(task_digest TEXT PRIMARY KEY, output_digest TEXT NOT NULL, output_size INTEGER NOT NULL,
                     seq INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
INSERT INTO meta VALUES('clean', '1');
)";

constexpr char kSchema2[] = R"(
CREATE TABLE compacted(job TEXT PRIMARY KEY, up_to INTEGER NOT NULL) STRICT, WITHOUT ROWID;
)";

constexpr char kSchema3[] = R"(
CREATE TABLE artifact_owner(digest TEXT NOT NULL, tenant TEXT NOT NULL, PRIMARY KEY(digest, tenant)) STRICT, WITHOUT ROWID;
)";

// SQLite's errors as ours. The only place where SQLiteCpp's exceptions end.
Status FromSqlite(const SQLite::Exception& e, std::string_view doing) {
  const std::string text = Join("the event log cannot ", doing, ": ", e.what());
  switch (e.getErrorCode()) {
    case SQLITE_FULL:
      return ResourceExhausted(text, "; free space in the state folder");
    case SQLITE_IOERR:
      // The index of the write-ahead log could not grow.
      if (e.getExtendedErrorCode() == SQLITE_IOERR_SHMSIZE) return ResourceExhausted(text, "; free space in the state folder");
      return Unavailable(text);
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

// Events (after_seq, up_to], of which none may be missing unless its job was compacted.
Status VisitEvents(SQLite::Database& db, uint64_t after_seq, uint64_t up_to, const std::function<Status(v1::Event)>& visit) {
  SQLite::Statement select(db, "SELECT seq, payload FROM events WHERE seq > ? AND seq <= ? ORDER BY seq");
  select.bind(1, static_cast<int64_t>(after_seq));
  select.bind(2, static_cast<int64_t>(up_to));
  uint64_t last = after_seq;
  while (select.executeStep()) {
    RF_ASSIGN_OR_RETURN(v1::Event event, Parse(select.getColumn(1), select.getColumn(0).getInt64()));
    if (event.seq() != ++last) {
      return DataLoss("the event log lacks event ", last, "; restore the state folder from a backup");
    }
    RF_RETURN_IF_ERROR(visit(std::move(event)));
  }
  if (last == up_to || after_seq >= up_to) return absl::OkStatus();
  return DataLoss("the event log ends at ", last, " instead of ", up_to, "; restore the state folder from a backup");
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
      : lock(std::move(folder_lock)), db(path.string(), SQLite::OPEN_READWRITE | SQLite::OPEN_CREATE, kBusyMs) {}

  FolderLock lock;
  SQLite::Database db;
  std::unique_ptr<SQLite::Statement> insert_event;
  std::unique_ptr<SQLite::Statement> insert_result;
  std::unique_ptr<SQLite::Statement> read_job;
  std::unique_ptr<SQLite::Statement> remove;
};

EventLog::EventLog() = default;

EventLog::~EventLog() {
  if (!impl_ || failed_) return;
  try {
    Failpoint("checkpoint_wal");
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
    RF_RETURN_IF_ERROR(log->Initialize(folder));
    log->failed_ = false;
  } catch (const SQLite::Exception& e) {
    return FromSqlite(e, "be opened");
  }
  return log;
}

Status EventLog::Initialize(const std::filesystem::path& folder) {
  SQLite::Database& db = impl_->db;
  db.exec("PRAGMA journal_mode=WAL");
  db.exec("PRAGMA synchronous=FULL");
  db.exec("PRAGMA foreign_keys=ON");
  db.exec(Join("PRAGMA wal_autocheckpoint=", kCheckpointPages));
  RF_RETURN_IF_ERROR(Migrate());

  was_unclean_ = db.execAndGet("SELECT value FROM meta WHERE key = 'clean'").getString() != "1";
  if (was_unclean_) RF_RETURN_IF_ERROR(CheckAfterUncleanStop(folder));
  db.exec("UPDATE meta SET value = '0' WHERE key = 'clean'");
  last_seq_ = db.execAndGet("SELECT coalesce(max(seq), 0) FROM events").getInt64();
  SQLite::Statement compacted(db, "SELECT job, up_to FROM compacted");
  while (compacted.executeStep()) compacted_[compacted.getColumn(0).getString()] = compacted.getColumn(1).getInt64();
  impl_->insert_event = std::make_unique<SQLite::Statement>(db, "INSERT INTO events VALUES(?, ?, ?, ?)");
  impl_->insert_result = std::make_unique<SQLite::Statement>(db, "INSERT OR REPLACE INTO results VALUES(?, ?, ?, ?)");
  impl_->read_job = std::make_unique<SQLite::Statement>(
      db, "SELECT seq, payload FROM events WHERE job = ? AND seq > ? ORDER BY seq LIMIT ?");
  impl_->remove = std::make_unique<SQLite::Statement>(
      db, "DELETE FROM events WHERE seq IN (SELECT seq FROM events WHERE job = ? AND seq <= ? ORDER BY seq LIMIT ?)");
  return absl::OkStatus();
}

Status EventLog::CheckAfterUncleanStop(const std::filesystem::path& folder) {
  std::error_code error;
  const uint64_t size = std::filesystem::file_size(folder / "refinery.db", error);
  if (size > kCheckAtOnceBytes && !std::filesystem::exists(folder / kDamagedFile, error)) {
    check_is_due_ = true;
    return absl::OkStatus();
  }
  RF_RETURN_IF_ERROR(CheckEventLog(folder));
  std::filesystem::remove(folder / kDamagedFile, error);
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
  if (version < 1) db.exec(kSchema);
  if (version < 2) db.exec(kSchema2);
  db.exec(kSchema3);
  db.exec(Join("PRAGMA user_version=", kSchemaVersion));
  transaction.commit();
  return absl::OkStatus();
}

// Within a transaction.
void EventLog::Insert(const v1::Event& event) {
  const std::string payload = event.SerializeAsString();
  SQLite::Statement& insert = *impl_->insert_event;
  insert.reset();
  insert.bind(1, static_cast<int64_t>(event.seq()));
  insert.bindNoCopy(2, event.job());
  insert.bind(3, static_cast<int64_t>(event.time_ms()));
  insert.bindNoCopy(4, payload.data(), static_cast<int>(payload.size()));
  insert.exec();
  if (!event.has_task_finished() || event.task_finished().task_digest().empty()) return;
  SQLite::Statement& result = *impl_->insert_result;
  result.reset();
  result.bindNoCopy(1, event.task_finished().task_digest());
  result.bindNoCopy(2, event.task_finished().output().digest());
  result.bind(3, static_cast<int64_t>(event.task_finished().output().size()));
  result.bind(4, static_cast<int64_t>(event.seq()));
  result.exec();
}

Status EventLog::Append(const std::vector<v1::Event>& events, const std::vector<ArtifactOwner>& owners) {
  if (events.empty() && owners.empty()) return absl::OkStatus();
  uint64_t seq = last_seq_;
  Failpoint("append_begin");
  try {
    SQLite::Transaction transaction(impl_->db, SQLite::TransactionBehavior::IMMEDIATE);
    for (const v1::Event& event : events) {
      if (event.seq() != ++seq) return Internal("event ", event.seq(), " does not follow event ", seq - 1);
      Insert(event);
    }
    for (const ArtifactOwner& owner : owners) {
      SQLite::Statement insert(impl_->db, "INSERT OR IGNORE INTO artifact_owner VALUES(?, ?)");
      insert.bind(1, owner.digest);
      insert.bind(2, owner.tenant);
      insert.exec();
    }
    Failpoint("append_before_commit");
    transaction.commit();
  } catch (const SQLite::Exception& e) {
    return AfterFailure(FromSqlite(e, "be written"));
  }
  Failpoint("append_after_commit");
  last_seq_ = seq;
  return absl::OkStatus();
}

// The failed transaction is rolled back by now. A full disk has left the log as it was, which is looked at and not assumed.
Status EventLog::AfterFailure(const Status& failure) {
  failed_ = true;
  if (!absl::IsResourceExhausted(failure)) return failure;
  for (const auto* statement : {&impl_->insert_event, &impl_->insert_result, &impl_->remove}) (*statement)->tryReset();
  try {
    const bool in_transaction = sqlite3_get_autocommit(impl_->db.getHandle()) == 0;
    const auto last = static_cast<uint64_t>(impl_->db.execAndGet("SELECT coalesce(max(seq), 0) FROM events").getInt64());
    if (in_transaction || last != last_seq_) {
      return Unavailable(Message(failure), "; and it ends at event ", last, " instead of ", last_seq_);
    }
  } catch (const SQLite::Exception& e) {
    return Unavailable(Message(failure), "; and it cannot be read: ", e.what());
  }
  failed_ = false;
  return failure;
}

Status EventLog::TryWriting() try {
  SQLite::Statement put(impl_->db, "INSERT OR REPLACE INTO meta VALUES('room', ?)");
  put.bind(1, std::string(kTriedBytes, 'x'));
  put.exec();
  impl_->db.exec("DELETE FROM meta WHERE key = 'room'");
  return absl::OkStatus();
} catch (const SQLite::Exception& e) {
  return AfterFailure(FromSqlite(e, "be written"));
}

void EventLog::LimitBytes(uint64_t bytes) {
  const int64_t page_bytes = impl_->db.execAndGet("PRAGMA page_size").getInt64();
  constexpr int64_t kNoLimit = 1'073'741'823;  // SQLite's own
  const int64_t pages = bytes == 0 ? kNoLimit : std::max<int64_t>(1, static_cast<int64_t>(bytes) / page_bytes);
  (void)impl_->db.execAndGet(Join("PRAGMA max_page_count=", pages));
}

StatusOr<std::vector<ArtifactOwner>> EventLog::ReadOwners() try {
  std::vector<ArtifactOwner> owners;
  SQLite::Statement select(impl_->db, "SELECT digest, tenant FROM artifact_owner");
  while (select.executeStep()) owners.push_back({select.getColumn(0).getString(), select.getColumn(1).getString()});
  return owners;
} catch (const SQLite::Exception& e) {
  return FromSqlite(e, "be read");
}

Status EventLog::RemoveOwners(const std::vector<ArtifactOwner>& owners) try {
  SQLite::Transaction transaction(impl_->db, SQLite::TransactionBehavior::IMMEDIATE);
  SQLite::Statement remove(impl_->db, "DELETE FROM artifact_owner WHERE digest = ? AND tenant = ?");
  for (const ArtifactOwner& owner : owners) {
    remove.reset();
    remove.bind(1, owner.digest);
    remove.bind(2, owner.tenant);
    remove.exec();
  }
  transaction.commit();
  return absl::OkStatus();
} catch (const SQLite::Exception& e) {
  return AfterFailure(FromSqlite(e, "be written"));
}

StatusOr<int> EventLog::Compact(const std::string& job, uint64_t up_to, int limit) try {
  SQLite::Transaction transaction(impl_->db, SQLite::TransactionBehavior::IMMEDIATE);
  if (CompactedTo(job) < up_to) {
    SQLite::Statement mark(impl_->db, "INSERT OR REPLACE INTO compacted VALUES(?, ?)");
    mark.bind(1, job);
    mark.bind(2, static_cast<int64_t>(up_to));
    mark.exec();
  }
  SQLite::Statement& remove = *impl_->remove;
  remove.reset();
  remove.bind(1, job);
  remove.bind(2, static_cast<int64_t>(up_to));
  remove.bind(3, limit);
  const int removed = remove.exec();
  Failpoint("compact_before_commit");
  transaction.commit();
  compacted_[job] = std::max(up_to, CompactedTo(job));
  return removed;
} catch (const SQLite::Exception& e) {
  return AfterFailure(FromSqlite(e, "be compacted"));
}

Status EventLog::Replay(const std::function<Status(v1::Event)>& visit, uint64_t after_seq) try {
  return VisitEvents(impl_->db, after_seq, last_seq_, visit);
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

uint64_t EventLog::CompactedTo(const std::string& job) const {
  const auto found = compacted_.find(job);
  return found == compacted_.end() ? 0 : found->second;
}

StatusOr<std::string> EventLog::ResultOf(const std::string& task_digest) try {
  SQLite::Statement select(impl_->db, "SELECT output_digest FROM results WHERE task_digest = ?");
  select.bind(1, task_digest);
  if (!select.executeStep()) return NotFound("no task with identity ", task_digest, " was finished");
  return select.getColumn(0).getString();
} catch (const SQLite::Exception& e) {
  return FromSqlite(e, "be read");
}

Status ReplayEventLog(const std::filesystem::path& folder, uint64_t after_seq, uint64_t up_to,
                      const std::function<Status(v1::Event)>& visit) try {
  SQLite::Database db((folder / "refinery.db").string(), SQLite::OPEN_READONLY, kBusyMs);
  return VisitEvents(db, after_seq, up_to, visit);
} catch (const SQLite::Exception& e) {
  return FromSqlite(e, "be read");
}

Status CheckEventLog(const std::filesystem::path& folder) {
  std::string verdict;
  try {
    SQLite::Database db((folder / "refinery.db").string(), SQLite::OPEN_READONLY, kBusyMs);
    verdict = db.execAndGet("PRAGMA quick_check(1)").getString();
    if (verdict == "ok") return absl::OkStatus();
  } catch (const SQLite::Exception& e) {
    const Status status = FromSqlite(e, "be checked");
    if (!absl::IsDataLoss(status)) return status;
    verdict = e.what();
  }
  (void)WriteFileAtomically(folder / kDamagedFile, verdict + "\n");
  return DataLoss("the event log is damaged: ", verdict, "; restore the state folder from a backup (refinery admin restore)");
}

StatusOr<uint64_t> CopyEventLog(const std::filesystem::path& folder, const std::filesystem::path& target) try {
  std::error_code error;
  if (std::filesystem::exists(target, error)) return AlreadyExists(target.string(), " exists; name another folder");
  SQLite::Database from((folder / "refinery.db").string(), SQLite::OPEN_READONLY, kBusyMs);
  SQLite::Database to(target.string(), SQLite::OPEN_READWRITE | SQLite::OPEN_CREATE, kBusyMs);
  // All pages in one step: within one read transaction, so that commits meanwhile neither change the copy nor start it anew.
  SQLite::Backup(to, from).executeStep(-1);
  to.exec("PRAGMA journal_mode=DELETE");  // one file, no WAL beside it
  to.exec("UPDATE meta SET value = '1' WHERE key = 'clean'");
  return static_cast<uint64_t>(to.execAndGet("SELECT coalesce(max(seq), 0) FROM events").getInt64());
} catch (const SQLite::Exception& e) {
  return FromSqlite(e, "be copied");
}

}  // namespace refinery::store
