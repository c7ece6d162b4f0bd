// Io of the formats in which a block is two vectors one after the other, made of load, store, load_half and store_half.
namespace lozo {
namespace LOZO_ISA {

template <>
struct Io<float> {
  static constexpr bool interleaved = false;
  LOZO_INLINE Pair<F> load(const float *p) { return {LOZO_ISA::load(p), LOZO_ISA::load(p + W)}; }
  LOZO_INLINE void store(float *p, Pair<F> y) {
    LOZO_ISA::store(p, y.a);
    LOZO_ISA::store(p + W, y.b);
  }
};

template <>
struct Io<f16> {
  static constexpr bool interleaved = false;
  LOZO_INLINE Pair<F> load(const f16 *p) { return {load_half(p), load_half(p + W)}; }
  LOZO_INLINE void store(f16 *p, Pair<F> y) {
    store_half(p, y.a);
    store_half(p + W, y.b);
  }
};

}  // namespace LOZO_ISA
}  // namespace lozo
