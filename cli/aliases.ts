// What users of stable-diffusion.cpp, A1111 and diffusers type for flags of `sdxl sample` and `sdxl serve` that have a shorter or another
// name here; docs/coming_from.md has the rest.

/** Other programs' words for our flags. */
const aliases: Readonly<Record<string, string>> = {
  '--cfg-scale': '--guidance-scale',
  '--sampling-method': '--scheduler',
  '--sampler': '--scheduler',
  '--init-img': '--image',
  '--control-net': '--controlnet',
  '--num-inference-steps': '--steps',
  '--num-images-per-prompt': '--num-images',
  '--taesd': '--tae',
  '--diffusion-model': '--unet',
  '--port': '--listen-port',
};

/** The command line with other programs' flags (`--flag value` and `--flag=value`) put into ours. */
export const spelledOut = (argv: readonly string[]): string[] =>
  argv.map((word) => {
    const [flag, ...rest] = word.split('=');
    return Object.hasOwn(aliases, flag) ? [aliases[flag], ...rest].join('=') : word;
  });
