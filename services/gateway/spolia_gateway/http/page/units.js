// Numbers as people read them.

const whole = new Intl.NumberFormat("en");

export const count = (n) => whole.format(n);
export const percent = (share) => `${(share * 100).toFixed(share > 0.995 && share < 1 ? 1 : 0)} %`;

export function milliseconds(ms) {
  if (ms >= 10_000) return `${(ms / 1000).toFixed(1)} s`;
  return ms >= 100 ? `${whole.format(Math.round(ms))} ms` : `${ms.toFixed(1)} ms`;
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
