// Shows ThreadSanitizer what Debian's abseil and gRPC do not: they are built without it, and order what they hand from one thread to
// another with atomics and futexes that it does not see. Here two kinds of functions of theirs, called by whomever, do what the library
// does, with the order that this makes told beside it:
//
//   absl::Mutex and absl::CondVar          what came before an unlock comes before the next lock
//   gRPC's calls and completion queues     what came before an operation's start comes before its end is seen
//   the end of a call with callbacks       what its other callbacks did comes before OnDone
//
// The program's definitions come before those of the shared libraries. Only in builds with REFINERY_SANITIZE=thread. Acquire and
// release alone, not TSan's model of a mutex: a lock may be waited for inside of the library.

#include <absl/synchronization/mutex.h>
#include <dlfcn.h>
#include <grpc/grpc.h>
#include <grpcpp/support/server_callback.h>
#include <sanitizer/tsan_interface.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

#define RF_TEXT_OF(x) #x
#define RF_TEXT(x) RF_TEXT_OF(x)

// A function of a shared library, looked up at its first call. No lock: it is called from under everything, and finding it twice does
// no harm.
template <typename Signature>
class Real {
 public:
  // Of abseil, by its mangled name within the versioned namespace; of gRPC by its name.
  enum class Library { kAbseil, kGrpc };
  constexpr explicit Real(const char* name, Library library = Library::kAbseil) : name_(name), library_(library) {}
  template <typename... Args>
  auto operator()(Args... args) {
    Signature* call = call_.load(std::memory_order_relaxed);
    if (call == nullptr) call_.store(call = reinterpret_cast<Signature*>(Find()), std::memory_order_relaxed);
    return call(args...);
  }

 private:
  void* Find() const {
    const char* const space = RF_TEXT(ABSL_OPTION_INLINE_NAMESPACE_NAME);
    char symbol[256];
    if (library_ == Library::kAbseil) {
      std::snprintf(symbol, sizeof(symbol), "_ZN4absl%zu%s%s", std::strlen(space), space, name_);
    } else {
      std::snprintf(symbol, sizeof(symbol), "%s", name_);
    }
    void* const found = dlsym(RTLD_NEXT, symbol);
    if (found == nullptr) {
      std::fprintf(stderr, "happens_before.cc: no library has %s\n", symbol);
      std::abort();
    }
    return found;
  }

  const char* const name_;
  const Library library_;
  std::atomic<Signature*> call_{nullptr};
};

// Stands in for a reactor in the one call of OnCancel that the library makes.
class ReleasingReactor final : public grpc::internal::ServerReactor {
 public:
  ReleasingReactor(char* call, grpc::internal::ServerReactor* reactor) : call_(call), reactor_(reactor) {}
  void OnDone() override {}
  void OnCancel() override {
    reactor_->OnCancel();
    __tsan_release(call_ + 12);
    delete this;
  }
  bool InternalInlineable() override { return reactor_->InternalInlineable(); }

 private:
  char* const call_;
  grpc::internal::ServerReactor* const reactor_;
};

}  // namespace

namespace absl {
ABSL_NAMESPACE_BEGIN

void Mutex::Lock() {
  static constinit Real<void(Mutex*)> real("5Mutex4LockEv");
  real(this);
  __tsan_acquire(this);
}

void Mutex::Unlock() {
  static constinit Real<void(Mutex*)> real("5Mutex6UnlockEv");
  __tsan_release(this);
  real(this);
}

bool Mutex::TryLock() {
  static constinit Real<bool(Mutex*)> real("5Mutex7TryLockEv");
  const bool is_locked = real(this);
  if (is_locked) __tsan_acquire(this);
  return is_locked;
}

void Mutex::ReaderLock() {
  static constinit Real<void(Mutex*)> real("5Mutex10ReaderLockEv");
  real(this);
  __tsan_acquire(this);
}

void Mutex::ReaderUnlock() {
  static constinit Real<void(Mutex*)> real("5Mutex12ReaderUnlockEv");
  __tsan_release(this);
  real(this);
}

void CondVar::Wait(Mutex* mutex) {
  static constinit Real<void(CondVar*, Mutex*)> real("7CondVar4WaitEPNS0_5MutexE");
  __tsan_release(mutex);
  real(this, mutex);
  __tsan_acquire(mutex);
}

bool CondVar::WaitWithTimeout(Mutex* mutex, Duration timeout) {
  static constinit Real<bool(CondVar*, Mutex*, Duration)> real("7CondVar15WaitWithTimeoutEPNS0_5MutexENS0_8DurationE");
  __tsan_release(mutex);
  const bool is_over = real(this, mutex, timeout);
  __tsan_acquire(mutex);
  return is_over;
}

bool CondVar::WaitWithDeadline(Mutex* mutex, Time deadline) {
  static constinit Real<bool(CondVar*, Mutex*, Time)> real("7CondVar16WaitWithDeadlineEPNS0_5MutexENS0_4TimeE");
  __tsan_release(mutex);
  const bool is_over = real(this, mutex, deadline);
  __tsan_acquire(mutex);
  return is_over;
}

ABSL_NAMESPACE_END
}  // namespace absl

extern "C" {

#define RF_GRPC(function) static constinit Real<decltype(function)> real(#function, Real<decltype(function)>::Library::kGrpc)

grpc_call_error grpc_call_start_batch(grpc_call* call, const grpc_op* ops, size_t count, void* tag, void* reserved) {
  RF_GRPC(grpc_call_start_batch);
  __tsan_release(tag);
  return real(call, ops, count, tag, reserved);
}

grpc_call_error grpc_server_request_call(grpc_server* server, grpc_call** call, grpc_call_details* details, grpc_metadata_array* metadata,
                                         grpc_completion_queue* of_call, grpc_completion_queue* queue, void* tag) {
  RF_GRPC(grpc_server_request_call);
  __tsan_release(tag);
  return real(server, call, details, metadata, of_call, queue, tag);
}

grpc_call_error grpc_server_request_registered_call(grpc_server* server, void* method, grpc_call** call, gpr_timespec* deadline,
                                                    grpc_metadata_array* metadata, grpc_byte_buffer** payload,
                                                    grpc_completion_queue* of_call, grpc_completion_queue* queue, void* tag) {
  RF_GRPC(grpc_server_request_registered_call);
  __tsan_release(tag);
  return real(server, method, call, deadline, metadata, payload, of_call, queue, tag);
}

grpc_event grpc_completion_queue_next(grpc_completion_queue* queue, gpr_timespec deadline, void* reserved) {
  RF_GRPC(grpc_completion_queue_next);
  const grpc_event event = real(queue, deadline, reserved);
  if (event.type == GRPC_OP_COMPLETE) __tsan_acquire(event.tag);
  return event;
}

grpc_event grpc_completion_queue_pluck(grpc_completion_queue* queue, void* tag, gpr_timespec deadline, void* reserved) {
  RF_GRPC(grpc_completion_queue_pluck);
  const grpc_event event = real(queue, tag, deadline, reserved);
  if (event.type == GRPC_OP_COMPLETE) __tsan_acquire(tag);
  return event;
}

// A call with callbacks counts them out in two atomics behind the object's table of virtual functions, partly in code that is compiled
// with us and partly in the library; who counts the last one calls ServerCallbackCall::ScheduleOnDone(bool), which calls OnDone.
void RefineryScheduleOnDone(char* call, bool is_inline) asm("_ZN4grpc8internal18ServerCallbackCall14ScheduleOnDoneEb");
void RefineryScheduleOnDone(char* call, bool is_inline) {
  static constinit Real<void(char*, bool)> real("_ZN4grpc8internal18ServerCallbackCall14ScheduleOnDoneEb",
                                                Real<void(char*, bool)>::Library::kGrpc);
  __tsan_acquire(call + 8);
  __tsan_acquire(call + 12);
  real(call, is_inline);
}

// ServerCallbackCall::CallOnCancel(ServerReactor*) runs OnCancel on another thread, which the library then counts out.
void RefineryCallOnCancel(char* call, grpc::internal::ServerReactor* reactor)
    asm("_ZN4grpc8internal18ServerCallbackCall12CallOnCancelEPNS0_13ServerReactorE");
void RefineryCallOnCancel(char* call, grpc::internal::ServerReactor* reactor) {
  static constinit Real<void(char*, grpc::internal::ServerReactor*)> real(
      "_ZN4grpc8internal18ServerCallbackCall12CallOnCancelEPNS0_13ServerReactorE",
      Real<void(char*, grpc::internal::ServerReactor*)>::Library::kGrpc);
  real(call, new ReleasingReactor(call, reactor));
}

}  // extern "C"
