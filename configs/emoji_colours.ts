// The names of a drawing's main colours: each pixel is given one of eleven basic names by its hue, saturation and value,
// and a name counts when it covers enough of what is drawn.

export const colourWords = [
  'black',
  'white',
  'gray',
  'brown',
  'pink',
  'red',
  'orange',
  'yellow',
  'green',
  'blue',
  'purple',
] as const;
type ColourWord = (typeof colourWords)[number];

/** The colours that cover at least an eighth of the opaque pixels, at most three, the largest first. */
export function coloursOf(rgba: Uint8Array): string[] {
  const counts = new Map<string, number>();
  let opaque = 0;
  for (let i = 0; i < rgba.length; i += 4) {
    if (rgba[i + 3] < 128) continue;
    const name = colourName(rgba[i], rgba[i + 1], rgba[i + 2]);
    counts.set(name, (counts.get(name) ?? 0) + 1);
    opaque++;
  }
  return [...counts]
    .filter(([, count]) => count >= opaque / 8)
    .sort(([a, m], [b, n]) => n - m || (a < b ? -1 : 1))
    .slice(0, 3)
    .map(([name]) => name);
}

/** The basic colour word for 8-bit red, green and blue. */
export function colourName(r: number, g: number, b: number): ColourWord {
  const [high, low] = [Math.max(r, g, b), Math.min(r, g, b)];
  const value = high / 255;
  const saturation = high === 0 ? 0 : (high - low) / high;
  if (value < 0.3) return 'black';
  if (saturation < 0.14) return value > 0.9 ? 'white' : value < 0.36 ? 'black' : 'gray';
  const hue = hueOf(r, g, b, high, low);
  if (hue >= 12 && hue < 50 && (value < 0.72 || (hue < 33 && saturation < 0.72 && value < 0.86)))
    return 'brown';
  if (hue < 14 || hue >= 335) return saturation < 0.5 && value > 0.75 ? 'pink' : 'red';
  if (hue < 34) return saturation < 0.45 ? 'pink' : 'orange';
  if (hue < 66) return 'yellow'; // from 34, as faces are at 37
  if (hue < 175) return 'green';
  if (hue < 245) return 'blue';
  if (hue < 300) return 'purple';
  return value > 0.75 ? 'pink' : 'purple';
}

/** In degrees: red 0, green 120, blue 240. */
function hueOf(r: number, g: number, b: number, high: number, low: number): number {
  const range = high - low;
  if (high === r) return (60 * ((g - b) / range) + 360) % 360;
  return high === g ? 120 + (60 * (b - r)) / range : 240 + (60 * (r - g)) / range;
}
