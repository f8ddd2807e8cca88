// What a checkpoint is, told from its headers alone: a diffusers folder, one component's folder, an original single file, a VAE, a
// LoRA, an IP-Adapter, a T2I-Adapter, or plain tensors. Each component is held against the shapes its config asks for, so a model that
// would fail to load is known without loading it.
import { existsSync, statSync } from 'node:fs';
import { basename, dirname, join } from 'node:path';
import { sizeOf } from '../engine/tensor.ts';
import { UserError } from '../io/errors.ts';
import { listFolder } from '../io/files.ts';
import { readJsonObject } from '../io/json.ts';
import type { TensorFile } from '../io/tensor_file.ts';
import { kindName, lackOf, rankOf, unsupportedKind } from './adapters/lora_kinds.ts';
import { type Json, type ModelSource, openModel, openWeights, refuseRun } from './checkpoint/checkpoint.ts';
import { matchParameters, sourceOf, type WeightInfo, type WeightSource } from './checkpoint/weights.ts';
import { openWeightsFile } from './checkpoint/weights_file.ts';
import { asWeightsTell } from './control/controlnet_union.ts';
import { kindOf } from './control/inpainting.ts';
import { isLLLiteFile, openLLLite } from './control/lllite.ts';
import { isT2IAdapter, openT2IAdapterFile } from './control/t2i_adapter.ts';
import { buildComponent, classOf } from './formats/components.ts';
import { markedIn } from './formats/marks.ts';
import { layoutOf, loneUNet } from './formats/sgm_keys.ts';
import { openSingleFile, openVaeFile } from './formats/singlefile.ts';
import { tinyPart } from './formats/taesd_file.ts';
import { openUNetFile } from './formats/unet_file.ts';
import { ipAdapter, isIPAdapter, parseIPAdapter } from './ip_adapter/ip_adapter.ts';
import { adapterAt, isAdapter, layersIn } from './lora/lora_file.ts';
import { isEDM } from './samplers/config.ts';
import { parseSchedulerConfig } from './samplers/config_checks.ts';
import { inversionIn } from './text/textual_inversion.ts';

export interface Component {
  name: string;
  /** The class its config names, where it has one. */
  class?: string;
  tensors: number;
  /** Elements of all tensors. */
  parameters: number;
  bytes: number;
  /** Tensors by stored type, as the file spells it. */
  dtypes: Record<string, number>;
  problems: readonly string[];
}

export interface Inspection {
  path: string;
  kind: string;
  components: Component[];
  /** Of an adapter: layers by kind, its ranks, and how many layers of which model it changes. */
  lora?: { kinds: Record<string, number>; ranks: number[]; layers: Record<string, number> };
  metadata: Record<string, string>;
  problems: readonly string[];
}

/** @throws UserError when the path is neither a model's folder nor a file of weights */
export function inspect(path: string): Inspection {
  if (!existsSync(path))
    throw new UserError(`nothing at ${path}; give a model's folder or a .safetensors or .gguf file`);
  return statSync(path).isDirectory() ? inspectFolder(path) : inspectFile(path);
}

function inspectFolder(path: string): Inspection {
  if (existsSync(join(path, 'model_index.json'))) return inspectPipeline(path);
  const adapter = adapterAt(path);
  if (adapter) return inspectFile(adapter);
  const configAt = (folder: string): Json => readJsonObject(join(folder, 'config.json'));
  const componentAt = (folder: string): Component =>
    inspectComponent(basename(folder), configAt(folder), () => openWeights(folder));
  if (existsSync(join(path, 'config.json'))) {
    const component = componentAt(path);
    const whose = whoseUNet(configAt(path));
    const kind = `diffusers component: ${component.class ?? 'unknown class'}${whose}`;
    return { path, kind, components: [component], metadata: {}, problems: component.problems };
  }
  const inversion = inversionIn(path);
  if (inversion) return inspectFile(inversion);
  // What was trained, as a checkpoint of training keeps it.
  const parts = listFolder(path).filter((name) => existsSync(join(path, name, 'config.json')));
  if (parts.length === 0) {
    refuseRun(path);
    throw new UserError(`${path} has neither model_index.json nor config.json; give a model's folder`);
  }
  const components = parts.map((name) => componentAt(join(path, name)));
  return { path, kind: 'diffusers components', components, metadata: {}, problems: problemsOf(components) };
}

const problemsOf = (components: readonly Component[]): string[] =>
  components.flatMap((c) => c.problems.map((problem) => `${c.name}: ${problem}`));

function inspectPipeline(path: string): Inspection {
  const source = openModel(path);
  const named = Object.entries(source.modelIndex).filter(
    ([, value]) => Array.isArray(value) && value.some((part) => part !== null),
  );
  const problems: string[] = [];
  const components: Component[] = [];
  let noise = '';
  for (const [name] of named) {
    if (!source.has(name)) problems.push(`${name} is named in model_index.json and its folder is missing`);
    else if (/^(unet|vae|text_encoder(_2)?)$/.test(name)) {
      components.push(inspectComponent(name, source.config(name), () => source.weights(name)));
    } else if (name === 'scheduler')
      problems.push(
        ...problemsIn(() => {
          noise = noiseOf(parseSchedulerConfig(source.config(name)));
          return [];
        }),
      );
  }
  if (components.length === 0) problems.push('model_index.json names no component that SDXL has');
  const { requires_aesthetics_score, _class_name = 'unknown pipeline' } = source.modelIndex;
  const seeing = source.has('unet') ? kindOf(source.config('unet')) : undefined;
  const kind =
    requires_aesthetics_score === true
      ? 'SDXL refiner'
      : seeing
        ? `SDXL ${seeing.name}`
        : String(_class_name);
  problems.push(...problemsOf(components));
  return { path, kind: `diffusers folder: ${kind}${noise}`, components, metadata: {}, problems };
}

/** Of a model whose noise is not SDXL's. */
const noiseOf = ({ _class_name: name }: { _class_name?: unknown }): string =>
  isEDM(name) ? `, trained under EDM's noise (${name})` : '';

/** The problems that `read` finds, or the one that keeps it from its end. */
function problemsIn(read: () => readonly string[]): readonly string[] {
  try {
    return read();
  } catch (error) {
    if (!(error instanceof UserError)) throw error;
    return [error.message];
  }
}

/** Holds a component's weights against what its config asks for; a config or file that cannot be read is a problem. */
function inspectComponent(name: string, told: Json, open: () => WeightSource): Component {
  let found = { name, class: classOf(told), ...summary([]) };
  const problems = problemsIn(() => {
    const weights = open();
    try {
      const config = asWeightsTell(told, weights);
      found = { ...found, class: classOf(config) };
      const built = buildComponent(config);
      const unfit = built
        ? matchParameters(built.module, weights).problems
        : [found.class ? `class ${found.class} is not one that SDXL has` : 'its config names no class'];
      const stored = weights.names.flatMap((key) => weights.info(key) ?? []);
      found = { ...found, ...summary(stored) };
      return [...unfit, ...unread(stored)];
    } finally {
      weights.close();
    }
  });
  return { ...found, problems };
}

/** A problem for each type of tensors that cannot be read. */
const unread = (tensors: readonly WeightInfo[]): string[] => [
  ...new Set(
    tensors.flatMap(({ storedAs, mend }) => (mend ? [`has tensors of type ${storedAs}: ${mend}`] : [])),
  ),
];

function summary(tensors: readonly WeightInfo[]): Omit<Component, 'name' | 'problems'> {
  const dtypes = new Map<string, number>();
  for (const { storedAs } of tensors) dtypes.set(storedAs, (dtypes.get(storedAs) ?? 0) + 1);
  return {
    tensors: tensors.length,
    parameters: tensors.reduce((sum, { shape }) => sum + sizeOf(shape), 0),
    bytes: tensors.reduce((sum, { bytes }) => sum + bytes, 0),
    dtypes: Object.fromEntries(dtypes),
  };
}

function inspectFile(path: string): Inspection {
  const file = openWeightsFile(path);
  try {
    const names = [...file.tensors.keys()];
    const base = { path, metadata: file.metadata };
    const layout = layoutOf(file.tensors);
    if (layout) return { ...base, ...inspectSingleFile(file, layout.prefixes) };
    if (isIPAdapter(names)) return { ...base, ...inspectIPAdapter(file) };
    if (isAdapter(file)) return { ...base, ...inspectLora(file) };
    const tensors = [...file.tensors.values()];
    if (loneUNet(file.tensors)?.original) return { ...base, ...inspectUNet(path, tensors) };
    const problems = unread(tensors);
    const components = [{ name: 'tensors', ...summary(tensors), problems }];
    const opened = (kind: string, name: string, open: (path: string) => ModelSource) => {
      // Of a half of a tiny autoencoder, those of the pair.
      const problems = problemsIn(() => {
        const source = open(path);
        return inspectComponent(name, source.config(name), () => source.weights(name)).problems;
      });
      return { ...base, kind, components: [{ ...components[0], name, problems }], problems };
    };
    const coder = kindOfCoder(file);
    if (coder) return opened(coder, 'vae', openVaeFile);
    if (isLLLiteFile(names)) return opened('ControlNet-LLLite', 'controlnet', openLLLite);
    if (isT2IAdapter(names)) return opened('T2I-Adapter in one file', 'adapter', openT2IAdapterFile);
    const kind = kindOfComponent(names, existsSync(join(dirname(path), 'config.json')));
    return { ...base, kind, components, problems };
  } finally {
    file.close();
  }
}

/** A UNet alone, as ComfyUI has it. */
function inspectUNet(path: string, tensors: readonly WeightInfo[]): Omit<Inspection, 'path' | 'metadata'> {
  const source = openUNetFile(path);
  const problems = [
    ...unread(tensors),
    ...inspectComponent('unet', source.config('unet'), () => source.weights('unet')).problems,
  ];
  const components = [{ name: 'unet', ...summary(tensors), problems }];
  const whose = whoseUNet(source.config('unet'));
  return { kind: `UNet${whose} in one file, original keys`, components, problems };
}

/** What a UNet that sees more than latents is of. */
function whoseUNet(config: Json): string {
  const kind = kindOf(config);
  return kind ? ` of an ${kind.name}` : '';
}

function kindOfCoder(file: TensorFile): string | undefined {
  const part = tinyPart(file);
  if (part) return part === 'whole' ? 'tiny autoencoder in one file' : `${part} of a tiny autoencoder`;
  const names = [...file.tensors.keys()];
  return names.some((name) => /^(first_stage_model\.|vae\.)?decoder\.up(_blocks)?\.0\./.test(name))
    ? 'VAE in one file'
    : undefined;
}

const kindOfComponent = (names: readonly string[], config: boolean): string => {
  const beside = config ? '; give its folder to hold it against its config' : '';
  if (names.includes('controlnet_mid_block.weight'))
    return `ControlNet weights under diffusers' keys${beside}`;
  if (names.includes('conv_in.weight') && names.includes('time_embedding.linear_1.weight'))
    return `UNet weights under diffusers' keys${beside}`;
  if (names.some((name) => /(^|\.)encoder\.layers\.0\.self_attn\./.test(name)))
    return `text encoder weights${beside}`;
  if (names.includes('clip_l') && names.includes('clip_g')) return 'textual inversion for SDXL';
  return `tensors of no kind that is known${beside}`;
};

function inspectSingleFile(
  file: TensorFile,
  prefixes: Readonly<Record<string, string>>,
): Omit<Inspection, 'path' | 'metadata'> {
  const all = [...file.tensors.values()];
  const owner = (name: string) =>
    Object.keys(prefixes).find((component) => name.startsWith(prefixes[component])) ?? 'other';
  const shapeOf = (name: string) => file.tensors.get(`${prefixes.unet}${name}.weight`)?.shape ?? [];
  const channels = { in_channels: shapeOf('input_blocks.0.0')[1], out_channels: shapeOf('out.2')[0] };
  const first = all.some(({ name }) => owner(name) === 'text_encoder') ? 'base' : 'refiner';
  // As stable-diffusion.cpp knows SSD-1B and Segmind-Vega.
  const whole = all.some(({ name }) => name.startsWith(`${prefixes.unet}middle_block.1.`));
  let kind = `${kindOf(channels)?.name ?? first}${channels.in_channels && !whole ? ', distilled' : ''}`;
  const components = [...new Set(all.map(({ name }) => owner(name)))].map((name) => {
    const mine = all.filter((tensor) => owner(tensor.name) === name);
    return { name, ...summary(mine), problems: name === 'other' ? [] : unread(mine) };
  });
  const unfit = problemsIn(() => {
    kind += noiseOf(markedIn(file).scheduler);
    const source = openSingleFile(file.path);
    for (const { name, problems } of components)
      if (name !== 'other')
        problems.push(...inspectComponent(name, source.config(name), () => source.weights(name)).problems);
    return [];
  });
  const problems = [...problemsOf(components), ...unfit];
  return { kind: `original single file: SDXL ${kind}`, components, problems };
}

function inspectIPAdapter(file: TensorFile): Omit<Inspection, 'path' | 'metadata'> {
  const weights = sourceOf(file.path, [file]);
  let kind = 'IP-Adapter';
  const problems = problemsIn(() => {
    const config = parseIPAdapter(weights);
    const { tokens, cross_attention_dim, inputs, resampler, widths } = config;
    const read = `${resampler ? 'hidden states' : 'an embedding'} of width ${inputs}`;
    kind += `${resampler ? ' plus' : ''}: ${read} as ${tokens} tokens of width ${cross_attention_dim}, for ${widths.length} layers`;
    return matchParameters(ipAdapter(config), weights).problems;
  });
  const components = [{ name: 'ip_adapter', ...summary([...file.tensors.values()]), problems }];
  return { kind, components, problems };
}

function inspectLora(file: TensorFile): Omit<Inspection, 'path' | 'metadata'> {
  const { layers, unknown } = layersIn(file);
  const kinds = new Map<string, number>();
  const ranks = new Set<number>();
  const targets: Record<string, number> = {};
  const problems = unread([...file.tensors.values()]);
  for (const name of unknown) {
    const kind = unsupportedKind(name);
    if (kind) kinds.set(kind, 0);
    problems.push(
      kind ? `${name} is a tensor of ${kind}, which is not supported` : `${name} is no part of an adapter`,
    );
  }
  for (const [module, parts] of layers) {
    const lack = lackOf(parts);
    if (lack) problems.push(`${module} has not all the tensors of one adapter (${lack})`);
    const kind = kindName(parts);
    kinds.set(kind, (kinds.get(kind) ?? 0) + 1);
    const rank = rankOf(parts);
    if (rank) ranks.add(rank);
    const target =
      /^(lora_unet|lora_te\d?|oft_unet|unet|text_encoder(_2)?|diffusion_model|text_encoders\.clip_.)(?=[._])/.exec(
        module,
      )?.[0] ?? 'unet';
    targets[target] = (targets[target] ?? 0) + 1;
  }
  const has = (start: RegExp) => [...file.tensors.keys()].some((name) => start.test(name));
  const spelling = has(/^(lora|lycoris|oft)_/)
    ? "kohya's"
    : has(/^(diffusion_model|text_encoders)\./)
      ? "ComfyUI's"
      : "diffusers' (peft)";
  const components = [{ name: 'adapter', ...summary([...file.tensors.values()]), problems }];
  const kind = `${[...kinds.keys()].sort().join(' and ')}, ${spelling} keys`;
  const lora = { kinds: Object.fromEntries(kinds), ranks: [...ranks].sort((a, b) => a - b), layers: targets };
  return { kind, components, lora, problems };
}
