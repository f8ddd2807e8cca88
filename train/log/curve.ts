// The loss curve as an SVG: every update's loss faint, and its running mean (Adam's bias-corrected exponential one) over
// it, and the validation loss where one was measured; on a logarithmic axis where the loss falls by more than ten times.
import type { LogEntry } from './log.ts';

const [width, height] = [800, 400];
const [left, right, top, bottom] = [64, 16, 32, 40];
/** Points drawn; more would not be seen. */
const mostPoints = 2000;

/** Where things are drawn. */
interface Chart {
  x(step: number): number;
  y(value: number): number;
}

/** The curve's SVG text. */
export function lossCurve(entries: readonly LogEntry[], title: string): string {
  const sound = entries.filter(({ loss }) => Number.isFinite(loss) && loss > 0);
  const losses = sound.map(({ loss }) => loss);
  const smooth = runningMean(losses);
  const measured = entries.filter(({ validation_loss: value = 0 }) => value > 0);
  const last = Math.max(1, sound.at(-1)?.step ?? 1, measured.at(-1)?.step ?? 1);
  const validation = measured.map(({ validation_loss }) => validation_loss as number);
  const { chart, rows } = chartOf(bounds([...smooth, ...validation]), last);
  const columns = ticks(0, last).map(
    (step) =>
      `<text x="${chart.x(step).toFixed(1)}" y="${height - bottom + 18}" text-anchor="middle">${step}</text>`,
  );
  return [
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${width} ${height}" font-family="sans-serif" font-size="12">`,
    `<title>${escaped(title)}</title>`,
    `<rect width="${width}" height="${height}" fill="#fff"/>`,
    `<text x="${left}" y="20" font-size="14">${escaped(title)}</text>`,
    ...rows,
    ...columns,
    `<text x="${width - right}" y="${height - 6}" text-anchor="end">updates</text>`,
    lineOf(chart, sound, losses, 'stroke="#1f77b4" stroke-opacity="0.25"'),
    lineOf(chart, sound, smooth, 'stroke="#1f77b4" stroke-width="2"'),
    ...(measured.length > 0
      ? [
          lineOf(chart, measured, validation, 'stroke="#d62728" stroke-width="2"'),
          `<text x="${width - right}" y="20" text-anchor="end" fill="#d62728">validation</text>`,
        ]
      : []),
    '</svg>',
    '',
  ].join('\n');
}

/** A chart of values between these and of steps up to `last`, and its lines across, each with its value. */
function chartOf([low, high]: readonly [number, number], last: number): { chart: Chart; rows: string[] } {
  const logarithmic = high / low > 10;
  const scale = (value: number) => (logarithmic ? Math.log10(value) : value);
  const [floor, ceiling] = [scale(low), scale(high)];
  const x = (step: number) => left + ((width - left - right) * step) / last;
  const y = (value: number) => {
    const share = (scale(value) - floor) / (ceiling - floor);
    return top + (height - top - bottom) * (1 - Math.min(1, Math.max(0, share)));
  };
  const rows = ticks(floor, ceiling).map((tick) => {
    const value = logarithmic ? 10 ** tick : tick;
    const at = y(value).toFixed(1);
    return (
      `<line x1="${left}" x2="${width - right}" y1="${at}" y2="${at}" stroke="#ddd"/>` +
      `<text x="${left - 8}" y="${at}" dy="4" text-anchor="end">${Number(value.toPrecision(3))}</text>`
    );
  });
  return { chart: { x, y }, rows };
}

/** A line through the values at these steps. */
function lineOf(
  { x, y }: Chart,
  at: readonly Pick<LogEntry, 'step'>[],
  values: readonly number[],
  style: string,
): string {
  const stride = Math.max(1, Math.ceil(at.length / mostPoints));
  const points = at.flatMap(({ step }, i) =>
    i % stride ? [] : [`${x(step).toFixed(1)},${y(values[i]).toFixed(1)}`],
  );
  return `<polyline fill="none" ${style} points="${points.join(' ')}"/>`;
}

/** An exponential mean over about a fiftieth of the run, so that a long run's curve is as smooth as a short one's. */
function runningMean(values: readonly number[]): number[] {
  const decay = 1 - 1 / Math.max(1, values.length / 50);
  let [mean, weight] = [0, 0];
  return values.map((value) => {
    mean = decay * mean + (1 - decay) * value;
    weight = decay * weight + (1 - decay);
    return mean / weight;
  });
}

/** A twentieth more than the smooth curve spans, above and below. */
function bounds(values: readonly number[]): [number, number] {
  if (values.length === 0) return [0.1, 1];
  const low = values.reduce((a, b) => Math.min(a, b));
  const high = values.reduce((a, b) => Math.max(a, b));
  return [low / 1.05, Math.max(high * 1.05, low * 1.0001)];
}

/** About five round numbers within the range. */
function ticks(from: number, to: number): number[] {
  const rough = (to - from) / 5;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 5].find((factor) => factor * power >= rough) ?? 10);
  const first = Math.ceil(from / step);
  const count = Math.floor(to / step) - first + 1;
  return Array.from({ length: Math.max(0, count) }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

const escaped = (text: string): string =>
  text.replaceAll('&', '&amp;').replaceAll('<', '&lt;').replaceAll('>', '&gt;');
