// A CPU allocator for PyTorch: blocks of large tensors are kept when these are gone, and the next tensor of about that
// size takes one. The C library's heap loses half of what it holds to this pattern: it looks for an aligned block with
// room for the alignment, which the gap of a block of the same size lacks as soon as a small object sits beside it.
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <sys/mman.h>

#include <map>
#include <mutex>

namespace {
constexpr size_t LARGE = 1 << 17, PAGE = 4096;  // bytes of a block that is kept

struct Kept : c10::Allocator {
  std::mutex lock;
  std::multimap<size_t, void*> free;
  std::map<void*, size_t> taken;

  static void give_back(void* block);
  void* take(size_t size) {
    const std::lock_guard<std::mutex> guard(lock);
    auto found = free.lower_bound(size);
    if (found == free.end() || found->first > size + size / 8) {  // none that is not too large: in place of a smaller
      if (found != free.begin()) drop(std::prev(found));
      void* block = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      TORCH_CHECK(block != MAP_FAILED, "no memory for ", size, " bytes");
      taken[block] = size;
      return block;
    }
    void* block = found->second;
    taken[block] = found->first;
    free.erase(found);
    return block;
  }
  void drop(std::multimap<size_t, void*>::iterator block) {
    munmap(block->second, block->first);
    free.erase(block);
  }
  c10::DataPtr allocate(size_t size) override {
    void* block = size < LARGE ? c10::alloc_cpu(size) : take((size + PAGE - 1) / PAGE * PAGE);
    return {block, block, &give_back, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, size_t count) const override { default_copy_data(to, from, count); }
};

Kept& kept() {
  static Kept* const one = new Kept;  // outlives every tensor
  return *one;
}

void Kept::give_back(void* block) {
  if ((uintptr_t)block % PAGE == 0) {  // of a page's beginning, as ours are
    Kept& all = kept();
    const std::lock_guard<std::mutex> guard(all.lock);
    if (const auto place = all.taken.find(block); place != all.taken.end()) {
      all.free.emplace(place->second, block);
      all.taken.erase(place);
      return;
    }
  }
  c10::free_cpu(block);
}
}  // namespace

extern "C" void turnout_keep_blocks() { c10::SetCPUAllocator(&kept()); }

// Give back what no tensor has.
extern "C" void turnout_release_blocks() {
  const std::lock_guard<std::mutex> guard(kept().lock);
  while (!kept().free.empty()) kept().drop(kept().free.begin());
}
