// JSON as files hold it, Python's with its infinities too, which JSON itself has not.
import { UserError } from './errors.ts';
import { readText } from './files.ts';

/** Lists and objects in each other: more than any file that is read here has. */
const mostDepth = 64;

/** The parsed JSON of `path`. @throws UserError when it cannot be read or is not JSON */
export function readJson(path: string): unknown {
  const value = parsed(path);
  if (!isDeeper(value, mostDepth)) return value;
  throw new UserError(`${path} has lists or objects more than ${mostDepth} deep: download it again`);
}

/** Whether lists and objects lie deeper in each other: what goes over them by recursion would run out of stack. */
export const isDeeper = (value: unknown, most: number): boolean =>
  typeof value === 'object' &&
  value !== null &&
  (most === 0 || Object.values(value).some((each) => isDeeper(each, most - 1)));

function parsed(path: string): unknown {
  const text = readText(path);
  try {
    return JSON.parse(text);
  } catch (error) {
    const value = withoutBareNumbers(text);
    if (value !== undefined) return value;
    const reason = (error as Error).message.replace(/\s+/g, ' ');
    throw new UserError(`${path} is not valid JSON (${reason}): correct it, or download it again`);
  }
}

/**
 * JSON as Python writes it, with infinities and NaN as bare words (diffusers' DPM-Solver has "lambda_min_clipped":
 * -Infinity); keys that have such a value are left out, and in a list null stands for it. Undefined for what is not JSON even so.
 */
function withoutBareNumbers(text: string): unknown {
  // Texts are matched so as to be passed over; 1e999 is how JSON can say Infinity.
  const plain = text.replace(/"(?:[^"\\]|\\.)*"|-?Infinity|NaN/g, (word) =>
    word.startsWith('"') ? word : '1e999',
  );
  try {
    return JSON.parse(plain, function (this: unknown, _, value) {
      if (value !== Infinity) return value;
      return Array.isArray(this) ? null : undefined;
    });
  } catch {
    return undefined;
  }
}

/** Whether a value is an object as JSON has them: no list, and not null. */
export const isRecord = (value: unknown): value is Record<string, unknown> =>
  typeof value === 'object' && value !== null && !Array.isArray(value);

/** The JSON object in `path`. @throws UserError as `readJson`, and when it holds a list or a lone value */
export function readJsonObject(path: string): Record<string, unknown> {
  const value = readJson(path);
  if (isRecord(value)) return value;
  throw new UserError(`${path} does not hold a JSON object: download it again`);
}
