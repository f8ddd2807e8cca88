// peft's config of an adapter, which tells the rank and alpha of each layer: diffusers keeps it in the metadata of the file, by the
// network's name, and peft in a file beside its own.
import { existsSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { type Context, createContext, Script } from 'node:vm';
import { UserError } from '../../io/errors.ts';
import { isRecord, readJsonObject } from '../../io/json.ts';
import type { TensorFile } from '../../io/tensor_file.ts';

/** What peft's own files put before each path. */
export const peftRoot = /^base_model\.model\./;

/** What of peft's LoraConfig, LoHaConfig and LoKrConfig tells alpha and rank, and of its OFTConfig how rotations are made. */
export interface PeftConfig {
  r?: number;
  lora_alpha?: number;
  /** LoHa and LoKr call it so. */
  alpha?: number;
  rank_pattern?: Record<string, number>;
  alpha_pattern?: Record<string, number>;
  use_rslora?: boolean;
  oft_block_size?: number;
  coft?: boolean;
  eps?: number;
  use_cayley_neumann?: boolean;
  num_cayley_neumann_terms?: number;
}

/** The config of a layer, by its path: diffusers keeps it in the metadata, peft in a file beside its own. */
export function peftConfigs(file: TensorFile): (path: string) => PeftConfig {
  const text = file.metadata.lora_adapter_metadata;
  if (text !== undefined) {
    const metadata = parsed(file, text);
    return (path) => {
      const prefix = `${path.split('.')[0]}.`;
      const mine = Object.entries(metadata).filter(([key]) => key.startsWith(prefix));
      return checked(file, Object.fromEntries(mine.map(([key, value]) => [key.slice(prefix.length), value])));
    };
  }
  const beside = join(dirname(file.path), 'adapter_config.json');
  const peft = [...file.tensors.keys()].some((name) => peftRoot.test(name));
  const config = peft && existsSync(beside) ? checked(file, readJsonObject(beside)) : {};
  return () => config;
}

function parsed(file: TensorFile, text: string): Record<string, unknown> {
  let found: unknown;
  try {
    found = JSON.parse(text);
  } catch {
    // Told below.
  }
  if (isRecord(found)) return found;
  throw new UserError(
    `LoRA ${file.path}: its "lora_adapter_metadata" is not a JSON object; save the adapter again`,
  );
}

const isNumber = (value: unknown): boolean => typeof value === 'number';

/** What its values are, where they are there. */
const wanted: readonly (readonly [keys: readonly (keyof PeftConfig)[], is: (value: unknown) => boolean])[] = [
  [['r', 'lora_alpha', 'alpha', 'oft_block_size', 'eps', 'num_cayley_neumann_terms'], isNumber],
  [['rank_pattern', 'alpha_pattern'], (value) => isRecord(value) && Object.values(value).every(isNumber)],
];

/** The config without its nulls. @throws UserError for values of another kind, which would be taken for some number */
function checked(file: TensorFile, config: Record<string, unknown>): PeftConfig {
  const there = Object.fromEntries(Object.entries(config).filter(([, value]) => value !== null));
  for (const [keys, is] of wanted)
    for (const key of keys)
      if (Object.hasOwn(there, key) && !is(there[key]))
        throw new UserError(
          `LoRA ${file.path}: "${key}" of its adapter's config is ${JSON.stringify(there[key])}, which is no number, or none by names; save the adapter again`,
        );
  return there;
}

/** peft's rule: the first pattern, a regular expression, that matches the path or an ending of it behind a dot. */
export function byPattern(patterns: Record<string, number> | undefined, path: string): number | undefined {
  return Object.entries(patterns ?? {}).find(([pattern]) => matches(pattern, path))?.[1];
}

/** More than any pattern takes that comes to an end. */
const mostMilliseconds = 1000;
const match = new Script('new RegExp(source).test(path)');
let aside: Context | undefined;

/** Patterns are a stranger's, and one such as (a+)+! may take years: what is more than a name runs as a script, which a clock can stop. */
function matches(pattern: string, path: string): boolean {
  const source = `^(.*\\.)?(${pattern})$`;
  if (/^[\w.]*$/.test(pattern)) return new RegExp(source).test(path);
  aside ??= createContext();
  try {
    Object.assign(aside, { source, path });
    return match.runInContext(aside, { timeout: mostMilliseconds });
  } catch (error) {
    const isSlow = (error as NodeJS.ErrnoException).code === 'ERR_SCRIPT_EXECUTION_TIMEOUT';
    throw new UserError(
      `"${pattern}" in the adapter's alpha_pattern or rank_pattern ${isSlow ? 'takes too long to match' : 'is no pattern'}: write the names of layers there`,
    );
  }
}

/** A layer by its path in the network. */
interface SizedLayer {
  path: string;
  rank: number;
  alpha: number;
}

/** peft's LoraConfig of a network's layers, most of which have the `usual` rank and alpha, as diffusers reads it in a file's metadata. */
export function peftEntries(
  network: string,
  layers: readonly SizedLayer[],
  usual: Pick<SizedLayer, 'rank' | 'alpha'>,
  more: Readonly<Record<string, unknown>>,
): Record<string, unknown> {
  const others = (key: 'rank' | 'alpha') =>
    Object.fromEntries(
      layers.filter((layer) => layer[key] !== usual[key]).map((layer) => [layer.path, layer[key]]),
    );
  const config = {
    peft_type: 'LORA',
    r: usual.rank,
    lora_alpha: usual.alpha,
    rank_pattern: others('rank'),
    alpha_pattern: others('alpha'),
    ...more,
  };
  return Object.fromEntries(Object.entries(config).map(([key, value]) => [`${network}.${key}`, value]));
}
