// Numbers as people read them.

const whole = new Intl.NumberFormat("en");

export const count = (n) => whole.format(n);
export const percent = (share) => `${(share * 100).toFixed(share > 0.995 && share < 1 ? 1 : 0)} %`;

export function milliseconds(ms) {
  if (ms >= 999.5) return `${(ms / 1000).toFixed(ms >= 9995 ? 1 : 2)} s`;
  return `${ms.toFixed(ms >= 99.5 ? 0 : 1)} ms`;
}

export function bytes(n) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let step = 0;
  while (n >= 999.5 && step < units.length - 1) {
    n /= 1000;
    step += 1;
  }
  return `${n >= 100 || step === 0 ? Math.round(n) : n.toFixed(1)} ${units[step]}`;
}
