// Runs CUDA threads as fibres of one OS thread.  They take turns where the threads of a block or
// of a warp wait for each other, in an order drawn from a seed.
//
// Blocks run one after the other; ThreadSanitizer, which knows fibres, sees them side by side.
// This file is compiled without sanitizers and tells them what goes on, if they are there.

#include <cuda_runtime.h>
#include <sys/mman.h>

#include <cstdlib>
#include <deque>
#include <memory>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define WEAK extern "C" __attribute__((weak))
WEAK void __sanitizer_start_switch_fiber(void** leaving, const void* stack, size_t bytes);
WEAK void __sanitizer_finish_switch_fiber(void* entered, const void** stack, size_t* bytes);
WEAK void __asan_unpoison_memory_region(const volatile void* address, size_t bytes);
WEAK void* __tsan_get_current_fiber();
WEAK void* __tsan_create_fiber(unsigned flags);
WEAK void __tsan_destroy_fiber(void* fiber);
WEAK void __tsan_switch_to_fiber(void* fiber, unsigned flags);
WEAK void __tsan_acquire(void* address);
WEAK void __tsan_release(void* address);
WEAK void AnnotateIgnoreReadsBegin(const char*, int);
WEAK void AnnotateIgnoreReadsEnd(const char*, int);
WEAK void AnnotateIgnoreWritesBegin(const char*, int);
WEAK void AnnotateIgnoreWritesEnd(const char*, int);

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// Saves the callee-saved registers and the stack pointer, and continues where `to` was saved.
extern "C" void emulated_switch(void** from, void* to);
asm(R"(
.text
.type emulated_switch, @function
emulated_switch:
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
  ret
.size emulated_switch, .-emulated_switch
)");

namespace emulated {
namespace {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 256 << 10, kGuardBytes = 4 << 10;
constexpr unsigned kUnordered = 1;  // a switch of ThreadSanitizer that orders no memory

// The emulator's own accesses are not the kernel's.
struct Unseen {
  Unseen() {
    if (!AnnotateIgnoreReadsBegin) return;
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    if (!AnnotateIgnoreReadsBegin) return;
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
};
void acquire(void* address) {
  if (__tsan_acquire) __tsan_acquire(address);
}
void release(void* address) {
  if (__tsan_release) __tsan_release(address);
}

// Where threads wait for each other.  They alternate between two sides: some may come to the next
// meeting while others are still to leave this one.
struct Meeting {
  int arrived = 0;
  unsigned turn = 0;
  const char* operation = nullptr;
  char ordered[2];  // addresses that stand for what is ordered
  char brought[2][kWarp][kMostBrought];
};

// What a thread has begun and not yet waited for, in groups.
template <class Item>
struct Background {
  struct Pending {
    Item item;
    int group;
  };
  std::deque<Pending> items;
  int group = 0;

  void add(const Item& item) { items.push_back({item, group}); }
  bool next_due(int pending, Item* item) {
    if (items.empty() || items.front().group >= group - pending) return false;
    *item = items.front().item;
    items.pop_front();
    return true;
  }
};

struct Fibre {
  uint3 index;
  void* registers = nullptr;  // its stack pointer; the rest is on the stack
  char* stack = nullptr;      // its lower end
  void *address_sanitizer = nullptr, *thread_sanitizer = nullptr;
  bool started = false, done = false;
  const char* waits_for = nullptr;
  Background<Copy> copies;
  Background<Product> products;
  std::vector<size_t> unfenced;  // units of shared memory that it has copied to
};

struct Scheduler {
  void* registers = nullptr;
  void *address_sanitizer = nullptr, *thread_sanitizer = nullptr;
  const void* stack = nullptr;
  size_t stack_bytes = 0;
};

struct Block {
  std::vector<Fibre> fibres;
  std::vector<Meeting> warps;
  Meeting all;
  std::unique_ptr<char, decltype(&std::free)> shared{nullptr, std::free};
  std::vector<const Fibre*> unfenced;  // who has copied to each unit
};

Scheduler scheduler;
Block* block;
Fibre* fibre;
const std::function<void()>* body;
std::string error;
bool failed;
std::minstd_rand generator;
unsigned seed;
int multiprocessors, shared_bytes = 232448, launches;
constexpr size_t kUnit = 16;
char all_done;  // stands for what the threads of a launch leave behind

int warp_of(const Fibre& f) { return static_cast<int>(f.index.x) / kWarp; }

void to_scheduler() {
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(fibre->done ? nullptr : &fibre->address_sanitizer,
                                   scheduler.stack, scheduler.stack_bytes);
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(scheduler.thread_sanitizer, kUnordered);
  emulated_switch(&fibre->registers, scheduler.registers);
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(fibre->address_sanitizer, &scheduler.stack,
                                    &scheduler.stack_bytes);
}

void run_fibre() {
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler.stack, &scheduler.stack_bytes);
  (*body)();
  release(&all_done);
  fibre->done = true;
  to_scheduler();
  std::abort();
}

void to_fibre(Fibre& f) {
  fibre = &f;
  threadIdx = f.index;
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(&scheduler.address_sanitizer, f.stack, kStackBytes);
  // The launch is ordered before each of its threads, and they are not ordered by taking turns.
  if (__tsan_switch_to_fiber)
    __tsan_switch_to_fiber(f.thread_sanitizer, f.started ? kUnordered : 0);
  f.started = true;
  emulated_switch(&scheduler.registers, f.registers);
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(scheduler.address_sanitizer, nullptr, nullptr);
}

// The fibre arrives; returns when `expected` have.  Which side it was on.
int arrive(Meeting& meeting, const char* operation, int expected, bool ordered,
           const std::function<void(int side)>& bring) {
  if (meeting.arrived && meeting.operation != operation)
    fault((std::string(operation) + " while others are at " + meeting.operation).c_str());
  const int side = meeting.turn % 2;
  if (ordered) release(&meeting.ordered[side]);
  meeting.operation = operation;
  bring(side);
  if (++meeting.arrived == expected) {
    meeting.arrived = 0;
    ++meeting.turn;
    for (Fibre& f : block->fibres)
      if (&meeting == &block->all || &meeting == &block->warps[warp_of(f)]) f.waits_for = nullptr;
  } else {
    fibre->waits_for = operation;
    to_scheduler();
  }
  if (ordered) acquire(&meeting.ordered[side]);
  return side;
}

// Stacks of one block's fibres, each above a page that faults.
class Stacks {
 public:
  explicit Stacks(size_t count) : bytes_(count * (kStackBytes + kGuardBytes)) {
    void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<char*>(memory);
    for (size_t i = 0; i < count; ++i) mprotect(at(i) - kGuardBytes, kGuardBytes, PROT_NONE);
    if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(memory_, bytes_);
  }
  ~Stacks() { munmap(memory_, bytes_); }
  char* at(size_t i) const { return memory_ + i * (kStackBytes + kGuardBytes) + kGuardBytes; }

 private:
  size_t bytes_;
  char* memory_;
};

void prepare(Fibre& f, char* stack) {
  f.stack = stack;
  // As emulated_switch leaves it: six registers and where to return to, at which the stack is
  // aligned as after a call.
  void** top = reinterpret_cast<void**>(stack + kStackBytes) - 1;
  *--top = reinterpret_cast<void*>(&run_fibre);
  f.registers = top - 6;
  if (__tsan_create_fiber) f.thread_sanitizer = __tsan_create_fiber(0);
}

// A warp runs as far as it can; which is next, and in which order its lanes take turns, is random.
// Some warps stay behind for long, so that others are far ahead.
void run_all() {
  const int warps = static_cast<int>(block->warps.size());
  std::vector<int> order(warps), lanes(kWarp);
  for (int w = 0; w < warps; ++w) order[w] = w;
  for (int l = 0; l < kWarp; ++l) lanes[l] = l;
  constexpr unsigned kTurnsOfAnOrder = 16;
  for (;;) {
    if (seed && generator() % kTurnsOfAnOrder == 0)
      std::shuffle(order.begin(), order.end(), generator);
    if (seed) std::shuffle(lanes.begin(), lanes.end(), generator);
    bool ran = false;
    for (int i = 0; i < warps && !ran; ++i)
      for (int lane : lanes) {
        Fibre& f = block->fibres[order[i] * kWarp + lane];
        if (f.done || f.waits_for) continue;
        ran = true;
        to_fibre(f);
        if (failed) return;
      }
    if (ran) continue;
    for (const Fibre& f : block->fibres)
      if (!f.done) {
        fibre = const_cast<Fibre*>(&f);
        failed = true;
        error = "block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
                std::to_string(blockIdx.z) + ") thread " + std::to_string(f.index.x) +
                " waits for ever: " + f.waits_for;
        return;
      }
    return;
  }
}

void run_block(dim3 dimensions, size_t shared) {
  const size_t threads = dimensions.x;
  Block here;
  here.fibres.resize(threads);
  here.warps.resize(threads / kWarp);
  void* memory = nullptr;
  if (shared && posix_memalign(&memory, kSharedAlignment, shared)) throw std::bad_alloc();
  here.shared.reset(static_cast<char*>(memory));
  if (shared) memset(memory, 0xFF, shared);
  here.unfenced.resize((shared + kUnit - 1) / kUnit);
  const Stacks stacks(threads);
  for (size_t i = 0; i < threads; ++i) {
    here.fibres[i].index = {static_cast<unsigned>(i), 0, 0};
    prepare(here.fibres[i], stacks.at(i));
  }
  block = &here;
  run_all();
  if (__tsan_destroy_fiber)
    for (Fibre& f : here.fibres) __tsan_destroy_fiber(f.thread_sanitizer);
}

}  // namespace

char* shared_memory() { return block->shared.get(); }

void launch(dim3 grid, dim3 dimensions, size_t shared, const std::function<void()>& thread) {
  failed = false;
  ++launches;
  if (dimensions.x % kWarp || dimensions.y != 1 || dimensions.z != 1 ||
      shared > static_cast<size_t>(shared_bytes))
    throw std::runtime_error("emulated: launches are of whole warps in one dimension");
  {
    const Unseen unseen;
    if (__tsan_get_current_fiber) scheduler.thread_sanitizer = __tsan_get_current_fiber();
    body = &thread;
    gridDim = grid;
    blockDim = dimensions;
    std::vector<uint3> blocks;
    for (unsigned z = 0; z < grid.z; ++z)
      for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) blocks.push_back({x, y, z});
    if (seed) std::shuffle(blocks.begin(), blocks.end(), generator);
    for (const uint3& index : blocks) {
      blockIdx = index;
      run_block(dimensions, shared);
      if (failed) break;
    }
  }
  acquire(&all_done);
}

void fault(const char* what) {
  failed = true;
  error = "block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
          std::to_string(blockIdx.z) + ") thread " + std::to_string(threadIdx.x) + ": " + what;
  fibre->done = true;
  to_scheduler();
  std::abort();
}

void meet(const char* operation, const void* mine, size_t size, void* all, bool ordered) {
  const Unseen unseen;
  Meeting& meeting = block->warps[warp_of(*fibre)];
  const int lane = fibre->index.x % kWarp;
  const int side = arrive(meeting, operation, kWarp, ordered,
                          [&](int side) { memcpy(meeting.brought[side][lane], mine, size); });
  for (int l = 0; l < kWarp; ++l)
    memcpy(static_cast<char*>(all) + l * size, meeting.brought[side][l], size);
}

bool lands_at_once() { return seed && generator() % 2; }
void copy_later(const Copy& copy) { fibre->copies.add(copy); }
void end_group() { ++fibre->copies.group; }
bool next_due(int pending, Copy* copy) { return fibre->copies.next_due(pending, copy); }
void multiply_later(const Product& product) { fibre->products.add(product); }
void end_product_group() { ++fibre->products.group; }
bool next_due(int pending, Product* product) { return fibre->products.next_due(pending, product); }

void copied(const char* shared) {
  const size_t unit = (shared - block->shared.get()) / kUnit;
  block->unfenced.at(unit) = fibre;
  fibre->unfenced.push_back(unit);
}
void fence_async_proxy() {
  for (size_t unit : fibre->unfenced)
    if (block->unfenced[unit] == fibre) block->unfenced[unit] = nullptr;
  fibre->unfenced.clear();
}
void read_async(const char* shared, size_t bytes) {
  const size_t unit = (shared - block->shared.get()) / kUnit;
  for (size_t i = 0; i < bytes / kUnit; ++i)
    if (block->unfenced.at(unit + i)) fault("read through the async proxy without a fence");
}

}  // namespace emulated

void __syncthreads() {
  using namespace emulated;
  const Unseen unseen;
  arrive(block->all, "__syncthreads", static_cast<int>(block->fibres.size()), true, [](int) {});
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = emulated::multiprocessors; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = emulated::shared_bytes; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
  }
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  memset(data, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return emulated::failed ? cudaErrorLaunchFailure : cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return emulated::error.c_str(); }

// ---- for the tests

// Forgets the launches there were.
//   seed  0 for the plain order, with copies that land when they are waited for
extern "C" void emulated_schedule(int multiprocessors, unsigned seed) {
  emulated::launches = 0;
  emulated::multiprocessors = multiprocessors;
  emulated::seed = seed;
  emulated::generator.seed(seed);
}
extern "C" int emulated_launches() { return emulated::launches; }
// Of an operator on the device: what no kernel writes stays NaN.
extern "C" void emulated_allocation(void* data, size_t bytes) { memset(data, 0xFF, bytes); }
