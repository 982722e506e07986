// Half precision (IEEE 754 binary16) as its bits: JavaScript has no such array everywhere, ONNX Runtime takes the bits.

const float = new Float32Array(1);
const bits = new Uint32Array(float.buffer);

// Rounded to the nearest, ties to even; what is too large becomes infinite.
export function toHalf(values) {
  return Uint16Array.from(values, (value) => {
    float[0] = value;
    const sign = (bits[0] >>> 16) & 0x8000;
    const rest = bits[0] & 0x7fffffff;
    if (rest > 0x7f800000) return sign | 0x7e00; // not a number
    if (rest >= 0x477ff000) return sign | 0x7c00;
    if (rest < 0x38800000) { // subnormal: steps of 2^-24
      float[0] = Math.abs(value) * 2 ** 24;
      const whole = Math.floor(float[0]);
      const over = float[0] - whole;
      return sign | (whole + Number(over > 0.5 || (over === 0.5 && whole % 2 === 1)));
    }
    return sign | ((rest - 0x38000000 + 0xfff + ((rest >>> 13) & 1)) >>> 13);
  });
}

export function fromHalf(halves) {
  return Float32Array.from(halves, (half) => {
    const sign = half & 0x8000 ? -1 : 1;
    const exponent = (half >>> 10) & 31;
    const fraction = half & 1023;
    if (exponent === 31) return fraction ? NaN : sign * Infinity;
    return exponent ? sign * 2 ** (exponent - 25) * (1024 + fraction) : sign * 2 ** -24 * fraction;
  });
}
