// The frozen teacher of a method that asks one: the UNet as the run's model was loaded, with nothing put on it. It shares the storage of
// what is not trained, so beside adapters it costs no memory. What is trained it copies, before a checkpoint or an update moves that. Or it
// is another model's UNet, whole on each device.
import type { Device } from '../../engine/device.ts';
import { holding } from '../../engine/memory.ts';
import { namedParameters, type Parameter, unload } from '../../engine/module.ts';
import { duplicate } from '../../engine/ops/move.ts';
import { built } from '../../engine/scope.ts';
import type { FloatDType } from '../../io/dtype.ts';
import type { ModelSource } from '../../models/checkpoint/checkpoint.ts';
import { parseUNetConfig, type UNet, type UNetConfig, unet } from '../../models/unet/unet.ts';
import { type Component, copied, type Substitute, twin } from '../passes/task.ts';

export interface Teacher {
  unet: UNet;
  /** The same beside a twin on that device, whose weights are named `component.key`: to be unloaded. */
  beside(weights: ReadonlyMap<string, Parameter>, device: Device): UNet;
  release(): void;
}

/** Of the loaded UNet's weights those in `moved` will be trained. */
export function teacherOf(
  config: UNetConfig,
  { parameters }: Component,
  moved: ReadonlySet<string>,
): Teacher {
  const made = makerOf(config);
  const own = made(parameters, (name, given) =>
    moved.has(name.slice('teacher.'.length)) ? duplicate(given) : given.handle(),
  );
  const frozen = namedParameters(own);
  return {
    unet: own,
    beside(weights, device) {
      const there = [...frozen].map(([key, mine]): [string, Parameter] => {
        return [key, moved.has(key) ? mine : (weights.get(`unet.${key}`) as Parameter)];
      });
      return made(new Map(there), copied(device));
    },
    release: () => unload(own),
  };
}

/** The UNet of another model, in the type of the run. @throws UserError where it cannot be loaded */
export function otherTeacher(source: ModelSource, device: Device, dtype: FloatDType): Teacher {
  const config = parseUNetConfig(source.config('unet'));
  const own = built(() => {
    const made = unet(config);
    holding('teacher', () => source.load('unet', made, device, dtype));
    return made;
  });
  return {
    unet: own,
    beside: (_, device) => makerOf(config)(namedParameters(own), copied(device)),
    release: () => unload(own),
  };
}

/** Makes UNets with a tensor for each weight. */
const makerOf =
  (config: UNetConfig) =>
  (parameters: ReadonlyMap<string, Parameter>, substitute: Substitute): UNet =>
    built(() => {
      const own = unet(config);
      twin({ name: 'teacher', parameters }, namedParameters(own), substitute);
      return own;
    });
