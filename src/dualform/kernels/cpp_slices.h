// What every file of slices has after the preamble and its sizes: windows of mini-batches that go through a pipeline, step by step.
// Sizes in entries: FIXED, TURNED, SUMS of a row, and HELD, if its state STAYS with it; SLOT and STATE of a mini-batch, the state first, PASSED from piece to piece;
// RING windows are passed on at a time, of W mini-batches; SCRATCH of a thread. LATE: m and so many steps after a window came in
// it is done. TURNS and BESIDE: pieces that run mini-batches in turn, and beside each other.
#include <sched.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(_OPENMP)
extern "C" int omp_get_thread_num(void);
extern "C" int omp_get_num_threads(void);
#endif

// Wait until `turn` is no longer `now`: awake for some microseconds, then asleep, so that a thread without a core may have this one.
INLINE void wait_turn(int* turn, int now, int* asleep) {
  for (int k = 0; k < 1000; ++k) {
    if (__atomic_load_n(turn, __ATOMIC_ACQUIRE) != now) return;
#if defined(__SSE__)
    __builtin_ia32_pause();
#endif
  }
  __atomic_add_fetch(asleep, 1, __ATOMIC_SEQ_CST);
  while (__atomic_load_n(turn, __ATOMIC_SEQ_CST) == now)
#if defined(__linux__)
    syscall(SYS_futex, turn, 128 /* wait, within this process */, now, nullptr, nullptr, 0);
#else
    sched_yield();
#endif
  __atomic_sub_fetch(asleep, 1, __ATOMIC_SEQ_CST);
}
INLINE void next_turn(int* turn, int now, int* asleep) {
  __atomic_store_n(turn, now + 1, __ATOMIC_SEQ_CST);
#if defined(__linux__)
  if (__atomic_load_n(asleep, __ATOMIC_SEQ_CST)) syscall(SYS_futex, turn, 129 /* wake, within this process */, 1 << 30, nullptr, nullptr, 0);
#endif
}
// Step after step, f(step, 0), ..., f(step, items - 1) beside each other; f(.., .., k) on thread k.
template <class F>
INLINE void stages(long threads, long steps, long items, F f) {
  long next = 0, here = 0;
  int turn = 0, asleep = 0;
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
#endif
  {
    Flush flush;
#if defined(_OPENMP)
    long k = omp_get_thread_num(), team = omp_get_num_threads();
#else
    long k = 0, team = 1;
#endif
    for (long t = 0; t <= steps; ++t) {
      for (long i; (i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < items;) f(t, i, k);
      int now = __atomic_load_n(&turn, __ATOMIC_ACQUIRE);
      if (__atomic_add_fetch(&here, 1, __ATOMIC_ACQ_REL) == team) {
        here = next = 0;
        next_turn(&turn, now, &asleep);
      } else {
        wait_turn(&turn, now, &asleep);
      }
    }
  }
}

// Mini-batches that go through a pipeline together. Groups of E come in from the last to the first, each in windows of W, its
// mini-batches in their order or from the last to the first.
struct Window {
  long at, order, group, from, first, last;  // its turn; its group's turn; the group and where it begins; from first to last
};
INLINE bool window(long at, long E, long count, bool forth, Window& w) {
  long each = (E - 1) / W + 1, groups = (count - 1) / E + 1, part = at % each;
  if (at < 0 || at >= groups * each) return false;
  w.at = at;
  w.order = at / each;
  w.group = groups - 1 - w.order;
  w.from = w.group * E;
  long end = w.from + E < count ? w.from + E : count;
  w.first = forth ? w.from + part * W : end - (part + 1) * W;
  w.last = forth ? (w.first + W < end ? w.first + W : end) : end - part * W;
  if (w.first < w.from) w.first = w.from;
  return w.first < w.last;
}

// What a call is made of: P rows of H heads, count mini-batches in groups of E, m windows each.
struct Call {
  long P, H, count, G, phase, E, m, steps;
  const Arg* g;
  T* rows;
};
INLINE Call call_of(long P, long H, long count, long G, long phase, const Arg* g, T* rows) {
  long E = STAYS ? count : G < count ? G : count, m = (E - 1) / W + 1;
  return {P, H, count, G, phase, E, m, ((count - 1) / E + 1) * m + (STAYS ? 0 : m) + LATE + 1, g, rows};
}
// Groups whose states are at hand: of those in `advance`, before the loop, and behind it.
INLINE long groups(const Call& c) { return 2 + (c.m + 1) / c.m; }
INLINE long row_size(const Call& c) { return FIXED + TURNED + SUMS + HELD + groups(c) * (c.E + 1) * SLOT + RING * W * PASSED; }

// Where a row's memory lies: what stays, its state if that stays, those of mini-batches, what is passed on.
struct Row {
  long b, h;
  T *f, *ct, *acc, *st, *own, *passed;
};
INLINE Row row_of(const Call& c, long row) {
  T *f = c.rows + row * row_size(c), *ct = f + FIXED, *acc = ct + TURNED, *st = acc + SUMS, *own = st + HELD;
  return {row / c.H, row % c.H, f, ct, acc, st, own, own + groups(c) * (c.E + 1) * SLOT};
}
INLINE T* state_of(const Call& c, const Row& r, const Window& w, long n) {
  return STAYS ? r.st : r.own + ((w.order % groups(c)) * (c.E + 1) + n - w.from) * SLOT;
}
INLINE T* passed_of(const Row& r, const Window& w, long n) { return r.passed + ((w.at % RING) * W + n - w.first) * PASSED; }

static void item(const Call& c, long t, long i, T* s);

extern "C" long need(long P, long count, long G, long threads) {
  return threads * SCRATCH + P * row_size(call_of(P, 1, count, G, 0, nullptr, nullptr));
}
extern "C" void run(long P, long H, long count, long G, long phase, const Arg* g, T* s, long threads) {
  Call c = call_of(P, H, count, G, phase, g, s + threads * SCRATCH);
  stages(threads, c.steps, TURNS * P + BESIDE * P * W, [=](long t, long i, long k) { item(c, t, i, s + k * SCRATCH); });
}
