// A call that both programs draw, in diffusers' words, and as flags of `sdxl sample`, which follow from them.

export type Settings = Record<string, string | number | readonly number[]>;

/** One picture, or several, as diffusers is called for it. */
export interface Call {
  label: string;
  pipeline: 'text2img' | 'img2img' | 'inpaint' | 'edit';
  model: string;
  seed: number;
  /** Keyword arguments of the pipeline; pictures by their paths. */
  settings: Settings;
  scheduler?: { class?: string; config?: Record<string, unknown> };
  loras?: readonly (readonly [file: string, scale: number])[];
  /** ControlNets' folders, what each follows, and how strongly where that is said. */
  controlnets?: readonly (readonly [folder: string, image: string, scale?: number])[];
  /** T2I-Adapters' folders, what each follows, and how strongly where that is said. */
  t2iAdapters?: readonly (readonly [folder: string, image: string, scale?: number])[];
  /** IP-Adapters' files, the picture that each draws by, and how strongly where that is said. */
  ipAdapters?: readonly (readonly [file: string, image: string, scale?: number])[];
  /** What then works over the latents, with the same generator and scheduler. */
  refiner?: { model: string; settings: Settings };
}

const flags: Readonly<Record<string, string>> = {
  num_inference_steps: 'steps',
  num_images_per_prompt: 'num-images',
  mask_image: 'mask',
};
const flag = (name: string) => `--${flags[name] ?? name.replaceAll('_', '-')}`;

/** diffusers has sizes as (height, width), flags as WIDTHxHEIGHT. */
function typed(name: string, value: Settings[string]): string {
  if (typeof value !== 'object') return String(value);
  return name.endsWith('size') ? value.toReversed().join('x') : value.join(',');
}

/** The same call for `sdxl sample`. */
export function argvOf({ model, seed, settings, scheduler, refiner: second, ...more }: Call): string[] {
  const { loras = [], controlnets = [], t2iAdapters = [], ipAdapters = [] } = more;
  const own = ['strength', 'aesthetic_score', 'negative_aesthetic_score'];
  const later = Object.entries(second?.settings ?? {}).filter(([name]) => own.includes(name));
  const { algorithm_type, use_karras_sigmas, timestep_spacing } = scheduler?.config ?? {};
  const sde = algorithm_type === 'sde-dpmsolver++';
  return [
    ...['sample', '--model', model, '--seed', String(seed), '--dtype', 'float32'],
    ...[...Object.entries(settings), ...later].flatMap(([name, value]) => [flag(name), typed(name, value)]),
    ...(scheduler?.class ? ['--scheduler', sde ? 'dpm++2m_sde' : scheduler.class] : []),
    ...(use_karras_sigmas ? ['--karras'] : []),
    ...(timestep_spacing ? ['--timestep-spacing', String(timestep_spacing)] : []),
    ...loras.flatMap(([file, scale]) => ['--lora', `${file}:${scale}`]),
    ...controlnets.flatMap(([net, image, scale]) => [
      ...['--controlnet', scale === undefined ? net : `${net}:${scale}`],
      ...['--control-image', image],
    ]),
    ...t2iAdapters.flatMap(([folder, image, scale]) => [
      ...['--adapter', scale === undefined ? folder : `${folder}:${scale}`],
      ...['--adapter-image', image],
    ]),
    ...ipAdapters.flatMap(([file, image, scale]) => [
      ...['--ip-adapter', scale === undefined ? file : `${file}:${scale}`],
      ...['--ip-adapter-image', image],
    ]),
    ...(second ? ['--refiner', second.model] : []),
  ];
}
