// What every generated file begins with: vectors as wide as the machine's, small matrix products, a few functions.
// T is float or double. No header of anybody else: a file compiles in a second or two.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#if !defined(_OPENMP)
#include <thread>
#include <vector>
#endif

#if defined(__AVX512F__)
#define BYTES 64
#define TALL 8
#elif defined(__AVX__)
#define BYTES 32
#define TALL 6
#else
#define BYTES 16
#define TALL 6
#endif
#define INLINE static inline __attribute__((always_inline))
#define FREE _Pragma("omp simd")

typedef T V __attribute__((vector_size(BYTES), aligned(sizeof(T)), may_alias));
enum { LANES = BYTES / sizeof(T) };

// One tensor of the caller: entries of block n, batch row b, head h begin at p + n sn + b sb + h sh.
struct Arg {
  char* p;
  long sn, sb, sh, s0, s1, s2, s3;
};

template <class U>
INLINE U* at(const Arg& a, long n, long b, long h) {
  return (U*)a.p + n * a.sn + b * a.sb + h * a.sh;
}
// Numbers of two bytes: widened while they are read, rounded to the nearest (even, where two are) when they are written.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
INLINE uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
INLINE float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
template <class U>
INLINE T get(const U* p) {
  return T(*p);
}
INLINE T get(const bf16* p) { return T(float_of(uint32_t(p->bits) << 16)); }
INLINE T get(const f16* p) {
  uint32_t u = p->bits, sign = (u & 0x8000u) << 16, e = u & 0x7c00u, all = (u & 0x7fffu) << 13;
  uint32_t small = bits_of(float(int32_t(u & 0x3ffu)) * (1.0f / 16777216)), large = all + (e == 0x7c00u ? 0x70000000u : 0x38000000u);
  return T(float_of(sign | (e ? large : small)));
}
template <class U>
INLINE void put(U* p, T x) {
  *p = U(x);
}
INLINE void put(bf16* p, T x) {
  uint32_t u = bits_of(float(x)), near = (u + 0x7fffu + ((u >> 16) & 1)) >> 16, nan = (u >> 16) | 0x40u;
  p->bits = uint16_t((u & 0x7fffffffu) > 0x7f800000u ? nan : near);
}
INLINE void put(f16* p, T x) {
  uint32_t u = bits_of(float(x)), sign = (u >> 16) & 0x8000u, all = u & 0x7fffffffu;
  uint32_t small = bits_of(float_of(all) + 0.5f) - 0x3f000000u;  // below 2^-14 the sum has a half's last place
  uint32_t large = (all - 0x38000000u + 0xfffu + ((all >> 13) & 1)) >> 13;
  uint32_t y = all < 0x38800000u ? small : all < 0x477ff000u ? large : all > 0x7f800000u ? 0x7e00u : 0x7c00u;
  p->bits = uint16_t(sign | y);
}

// A row of the caller's, n entries `last` apart, into a row of ours, `step` apart, and back. The row `ahead` entries on is needed soon.
template <int n, int step, class U>
INLINE void take(T* out, const U* in, long last, long ahead) {
  if (last == 1 && ahead)
    for (int j = 0; j < n; j += 64 / sizeof(U)) __builtin_prefetch((const char*)(in + j) + ahead * long(sizeof(U)));
  if (last == 1)
    FREE for (int j = 0; j < n; ++j) out[j * step] = get(in + j);
  else
    for (int j = 0; j < n; ++j) out[j * step] = get(in + j * last);
}
template <int n, int step, class U>
INLINE void give(U* out, const T* in, long last) {
  if (last == 1)
    FREE for (int j = 0; j < n; ++j) put(out + j, in[j * step]);
  else
    for (int j = 0; j < n; ++j) put(out + j * last, in[j * step]);
}

// Numbers too small to be written with all their digits take a hundred times as long as others: in here they are zero.
struct Flush {
#if defined(__SSE__)
  unsigned before = __builtin_ia32_stmxcsr();
  Flush() { __builtin_ia32_ldmxcsr(before | 0x8040); }
  ~Flush() { __builtin_ia32_ldmxcsr(before); }
#elif defined(__aarch64__)
  unsigned long before;
  Flush() {
    asm volatile("mrs %0, fpcr" : "=r"(before));
    asm volatile("msr fpcr, %0" : : "r"(before | (1ul << 24)));
  }
  ~Flush() { asm volatile("msr fpcr, %0" : : "r"(before)); }
#endif
};

// a b + c, rounded once where the machine can. Left alone, a compiler would choose by what stands next to it, and how work is cut
// into functions would show in the last bit; so it is left alone in matrix products only.
#if defined(__FMA__) || defined(__aarch64__)
INLINE float mad(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
INLINE double mad(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
INLINE float mad(float a, float b, float c) { return a * b + c; }
INLINE double mad(double a, double b, double c) { return a * b + c; }
#endif

// exp x = 2^n exp r, |r| <= ln 2 / 2, by a polynomial; branch-free, so that loops of it become vector code.
INLINE float exp_(float x) {
  float z = x < -87.33654f ? -87.33654f : x > 88.72283f ? 88.72283f : x;
  float n = std::floor(mad(z, 1.44269504f, 0.5f));
  n = n > 127.0f ? 127.0f : n;
  float r = mad(n, 2.12194440e-4f, mad(n, -0.693359375f, z)), p = 1.0f / 5040;
  p = mad(p, r, 1.0f / 720);
  p = mad(p, r, 1.0f / 120);
  p = mad(p, r, 1.0f / 24);
  p = mad(p, r, 1.0f / 6);
  p = mad(p, r, 0.5f);
  p = mad(p, r, 1.0f);
  p = mad(p, r, 1.0f);
  int32_t bits = (int32_t(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, 4);
  float y = p * scale;
  y = x > 88.72283f ? INFINITY : y;
  y = x < -103.97f ? 0.0f : y;
  return x != x ? x : y;
}
INLINE double exp_(double x) {
  double z = x < -708.39 ? -708.39 : x > 709.78 ? 709.78 : x;
  double n = std::floor(mad(z, 1.4426950408889634, 0.5));
  n = n > 1023.0 ? 1023.0 : n;
  double r = mad(n, -1.42860682030941723212e-6, mad(n, -0.693145751953125, z)), p = 1.0 / 6227020800.0;
  p = mad(p, r, 1.0 / 479001600.0);
  p = mad(p, r, 1.0 / 39916800.0);
  p = mad(p, r, 1.0 / 3628800.0);
  p = mad(p, r, 1.0 / 362880.0);
  p = mad(p, r, 1.0 / 40320.0);
  p = mad(p, r, 1.0 / 5040.0);
  p = mad(p, r, 1.0 / 720.0);
  p = mad(p, r, 1.0 / 120.0);
  p = mad(p, r, 1.0 / 24.0);
  p = mad(p, r, 1.0 / 6.0);
  p = mad(p, r, 0.5);
  p = mad(p, r, 1.0);
  p = mad(p, r, 1.0);
  int64_t bits = (int64_t(n) + 1023) << 52;
  double scale;
  std::memcpy(&scale, &bits, 8);
  double y = p * scale;
  y = x > 709.782712893384 ? INFINITY : y;
  y = x < -745.2 ? 0.0 : y;
  return x != x ? x : y;
}
INLINE T sigmoid_(T x) {
  T e = exp_(-std::fabs(x)), s = T(1) / (T(1) + e);
  return x >= 0 ? s : x != x ? x : e * s;
}
INLINE T tanh_(T x) {
  T a = std::fabs(x), e = exp_(T(-2) * a), large = (T(1) - e) / (T(1) + e), q = x * x;
  // near zero the quotient would lose what cancels
  T small = a * (T(1) + q * (T(-1.0 / 3) + q * (T(2.0 / 15) + q * (T(-17.0 / 315) + q * (T(62.0 / 2835) +
            q * (T(-1382.0 / 155925) + q * T(21844.0 / 6081075)))))));
  T y = a < T(sizeof(T) == 4 ? 0.25 : 0.03) ? small : large;
  return x < 0 ? -y : x != x ? x : y;
}

// The remainder that has the divisor's sign, and the quotient that goes with it.
INLINE T remainder_(T x, T y) {
  T r = std::fmod(x, y);
  return r != 0 && (r < 0) != (y < 0) ? r + y : r;
}
INLINE T floor_divide_(T x, T y) {
  T r = std::fmod(x, y), q = std::nearbyint((x - r) / y);
  return y == 0 ? x / y : r != 0 && (r < 0) != (y < 0) ? q - 1 : q;
}
// sum over k of (x + k)^-s: Euler and Maclaurin, from x >= 12 on. polygamma n: (-1)^(n + 1) n! of that at s = n + 1.
static inline double polygamma_(int n, double x) {
  if (n == 1) {  // as torch computes it: to nine digits
    double sum = 0, sine = 0;
    bool turned = x < 0.5;
    if (turned) sine = std::sin(3.14159265358979323846 * x), sum = -9.86960440108935861883 / (sine * sine), x = 1 - x;
    for (int k = 0; k < 6; ++k, x += 1) sum += 1 / (x * x);
    double z = 1 / (x * x);
    sum += (1 + 1 / (2 * x) + z * (1.0 / 6 - z * (1.0 / 30 - z * (1.0 / 42)))) / x;
    return turned ? -sum : sum;
  }
  if (x <= 0 && x == std::floor(x)) return n % 2 ? INFINITY : NAN;
  const double B[] = {1.0 / 6, -1.0 / 30, 1.0 / 42, -1.0 / 30, 5.0 / 66, -691.0 / 2730, 7.0 / 6};
  double s = n + 1, sum = 0, factor = n % 2 ? 1 : -1;
  for (int k = 2; k <= n; ++k) factor *= k;
  for (; x < 12; x += 1) sum += std::pow(x, -s);
  double term = s * std::pow(x, -s - 1) / 2;
  sum += std::pow(x, 1 - s) / (s - 1) + std::pow(x, -s) / 2;
  for (int k = 0; k < 7; ++k) {
    sum += B[k] * term;
    term *= (s + 2 * k + 1) * (s + 2 * k + 2) / (x * x * (2 * k + 3) * (2 * k + 4));
  }
  return factor * sum;
}
static inline double digamma_(double x) {
  if (x == 0) return std::copysign(double(INFINITY), -x);
  if (x < 0 && x == std::floor(x)) return NAN;
  double y = 0, pi = 3.14159265358979323846;
  if (x < 0) {
    double r = std::fmod(x, 1.0);  // the tangent's period
    y = -pi / std::tan(pi * r);
    x = 1 - x;
  }
  for (; x < 12; x += 1) y -= 1 / x;
  double z = 1 / (x * x), tail = z * (1.0 / 12 - z * (1.0 / 120 - z * (1.0 / 252 - z * (1.0 / 240 - z * (1.0 / 132 - z * (691.0 / 32760 - z / 12))))));
  return y + std::log(x) - 0.5 / x - tail;
}
// The y >= 0 whose erfc is c: a guess, then steps of third order.
static inline double erfc_inverse_(double c) {
  if (!(c > 0)) return c == 0 ? INFINITY : NAN;
  double w = -std::log(c * (2 - c)), b = 4.330746750799873 - w / 2, y = std::sqrt(std::fmax(std::sqrt(b * b + w / 0.147) - b, 0.0));
  if (c < 1e-4) y = std::sqrt(-std::log(c) - 0.5 * std::log(-3.14159265358979323846 * std::log(c)));
  for (int k = 0; k < 4; ++k) {
    double f = (c < 0.5 ? std::erfc(y) - c : (1 - c) - std::erf(y)) * 0.88622692545275801365 * std::exp(y * y);
    y += f / (1 + y * f);
  }
  return y;
}
static inline double erfinv_(double x) {
  double a = std::fabs(x), y = 0.88622692545275801365 * a;
  if (a > 1 || x != x) return NAN;
  if (a > 0.5) return std::copysign(erfc_inverse_(1 - a), x);
  y *= 1 + 0.2617993877991494 * a * a;
  for (int k = 0; k < 4; ++k) {
    double f = (a - std::erf(y)) * 0.88622692545275801365 * std::exp(y * y);
    y += f / (1 + y * f);
  }
  return std::copysign(y, x);
}
static inline double ndtri_(double p) {
  if (!(p >= 0 && p <= 1)) return NAN;
  double root = 1.41421356237309504880;
  return p < 0.25 ? -root * erfc_inverse_(2 * p) : p > 0.75 ? root * erfc_inverse_(2 * (1 - p)) : root * erfinv_(2 * p - 1);
}
// exp(x^2) erfc x
static inline double erfcx_(double x) {
  if (x < 12) return std::exp(x * x) * std::erfc(x);
  double z = 1 / (2 * x * x), term = 1, sum = 1;
  for (int k = 1; k < 12; ++k) sum += term *= -(2 * k - 1) * z;
  return sum * 0.56418958354775628695 / x;
}
// exp(-|x|) I_n x, n 0 or 1: a power series, all of one sign, or the expansion at infinity
static inline double bessel_ie_(int n, double x) {
  double a = std::fabs(x), term = n ? a / 2 : 1, sum = term, q = a * a / 4;
  if (a < 30) {
    for (int k = 1; k < 90; ++k) sum += term *= q / (k * double(k + n));
    sum *= std::exp(-a);
  } else {
    term = sum = 1;
    for (int k = 1; k < 25; ++k) sum += term *= -(4.0 * n * n - (2 * k - 1) * double(2 * k - 1)) / (8 * k * a);
    sum /= std::sqrt(6.28318530717958647693 * a);
  }
  return n && x < 0 ? -sum : sum;
}
static inline double bessel_i_(int n, double x) { return std::exp(std::fabs(x)) * bessel_ie_(n, x); }

// f(0), ..., f(n - 1) on threads of their own: OpenMP's, which wait for work where torch's do, if the compiler has it.
template <class F>
INLINE void parallel(long n, F f) {
  if (n == 1) return f(0);
#if defined(_OPENMP)
#pragma omp parallel for num_threads(n) schedule(static, 1)
  for (long k = 0; k < n; ++k) f(k);
#else
  std::vector<std::thread> others;
  for (long k = 1; k < n; ++k) others.emplace_back(f, k);
  f(0);
  for (auto& x : others) x.join();
#endif
}

INLINE V load(const T* p) { return *(const V*)p; }
INLINE void store(T* p, V x) { *(V*)p = x; }

// Vectors a and b, entries of which pick says from where: i of a, LANES + i of b. clang and GCC spell it differently.
#if defined(__clang__)
#define SHUFFLE(a, b, pick) __builtin_shufflevector(a, b, pick)
#else
#define SHUFFLE(a, b, pick) __builtin_shuffle(a, b, Lanes{pick})
typedef std::conditional<sizeof(T) == 4, int32_t, int64_t>::type Lane;
typedef Lane Lanes __attribute__((vector_size(BYTES)));
#endif
template <int S, int... i>
INLINE void exchange(V& a, V& b, std::integer_sequence<int, i...>) {
  V low = SHUFFLE(a, b, (i & S ? LANES + i - S : i)...), high = SHUFFLE(a, b, (i & S ? LANES + i : i + S)...);
  a = low;
  b = high;
}
// A square of vectors, transposed: where i has bit S and j not, entries (i, j) and (i - S, j + S) change places, for every S.
template <int S = LANES / 2>
INLINE void turn_square(V* x) {
  if constexpr (S > 0) {
#pragma GCC unroll 16
    for (int r = 0; r < LANES; ++r)
      if (!(r & S)) exchange<S>(x[r], x[r + S], std::make_integer_sequence<int, LANES>());
    turn_square<S / 2>(x);
  }
}

// out[c * ldo + r] = in[r * ldi + c], plus beta D[c * ldd + r] if there is a D; R x C
template <int R, int C>
INLINE void turn(T* out, int ldo, const T* in, int ldi, T beta = 0, const T* D = nullptr, int ldd = 0) {
  constexpr int rows = R - R % LANES, columns = C - C % LANES;
  for (int r0 = 0; r0 < rows; r0 += LANES)
    for (int c0 = 0; c0 < columns; c0 += LANES) {
      V x[LANES];
#pragma GCC unroll 16
      for (int r = 0; r < LANES; ++r) x[r] = load(in + (r0 + r) * ldi + c0);
      turn_square(x);
#pragma GCC unroll 16
      for (int c = 0; c < LANES; ++c) {
        if (D) x[c] += beta * load(D + (c0 + c) * ldd + r0);
        store(out + (c0 + c) * ldo + r0, x[c]);
      }
    }
  for (int c = 0; c < C; ++c)
    for (int r = c < columns ? rows : 0; r < R; ++r) out[c * ldo + r] = in[r * ldi + c] + (D ? beta * D[c * ldd + r] : T(0));
}

#if defined(__clang__)
#pragma clang fp contract(fast)
#else
#pragma GCC push_options
#pragma GCC optimize("fp-contract=fast")
#endif
// A tile of C = beta D + alpha A B: MR rows, NV vectors. A is read entry by entry at any stride, B in vectors.
template <int MR, int NV, int K, int SAM, int SAK, int LDB>
INLINE void tile(T* C, int ldc, const T* A, const T* B, T alpha, T beta, const T* D, int ldd) {
  V acc[MR][NV];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) acc[m][v] = V{};
  for (int k = 0; k < K; ++k) {
    V b[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) b[v] = load(B + k * LDB + v * LANES);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      T a = A[m * SAM + k * SAK];
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[m][v] += a * b[v];
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      V x = alpha * acc[m][v];
      if (D) x += beta * load(D + m * ldd + v * LANES);
      store(C + m * ldc + v * LANES, x);
    }
}
template <int M, int MR, int NV, int K, int SAM, int SAK, int LDB>
INLINE void column(T* C, int ldc, const T* A, const T* B, T alpha, T beta, const T* D, int ldd) {
  int m = 0;
  for (; m + MR <= M; m += MR)
    tile<MR, NV, K, SAM, SAK, LDB>(C + m * ldc, ldc, A + m * SAM, B, alpha, beta, D ? D + m * ldd : D, ldd);
  if constexpr (M % MR != 0)
    tile<M % MR, NV, K, SAM, SAK, LDB>(C + m * ldc, ldc, A + m * SAM, B, alpha, beta, D ? D + m * ldd : D, ldd);
}
// C (M, N) = beta D + alpha A B; rows of B, C and D may be read, those of C written, up to the next whole vector.
template <int M, int N, int K, int SAM, int SAK, int LDB, bool SUM>
static __attribute__((noinline)) void mm(T* C, int ldc, const T* A, const T* B, T alpha, T beta, const T* D, int ldd) {
  constexpr int nv = (N + LANES - 1) / LANES;
  if (!SUM) D = nullptr;
  int v = 0;
  // few rows: as many sums at once as a tile has, all along a row of B
  constexpr int wide = M == 1 ? 8 : M == 2 ? 6 : M <= 4 ? 4 : 2;
  if constexpr (wide > 2)
    for (; v + wide <= nv; v += wide)
      column<M, M, wide, K, SAM, SAK, LDB>(C + v * LANES, ldc, A, B + v * LANES, alpha, beta, SUM ? D + v * LANES : D, ldd);
  for (; v + 2 <= nv; v += 2)
    column<M, TALL, 2, K, SAM, SAK, LDB>(C + v * LANES, ldc, A, B + v * LANES, alpha, beta, SUM ? D + v * LANES : D, ldd);
  if constexpr (nv % 2 != 0)
    column<M, 2 * TALL, 1, K, SAM, SAK, LDB>(C + v * LANES, ldc, A, B + v * LANES, alpha, beta, SUM ? D + v * LANES : D, ldd);
}
// The same with N = 1: a matrix with rows of unit stride times a vector, or any strides.
template <int M, int K, int SAM, int SAK, int SB>
static __attribute__((noinline)) void mv(T* C, int sc, const T* A, const T* B, T alpha, T beta, const T* D, int sd) {
  for (int m = 0; m < M; ++m) {
    T sum = 0;
    _Pragma("omp simd reduction(+ : sum)") for (int k = 0; k < K; ++k) sum += A[m * SAM + k * SAK] * B[k * SB];
    C[m * sc] = alpha * sum + (D ? beta * D[m * sd] : T(0));
  }
}
#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC pop_options
#endif
