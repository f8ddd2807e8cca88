// A ControlNet that is switched on and off between steps, and the gradients of one, through the cuda device on the virtual GPU,
// beside the cpu device. Apart from cuda_models.test.ts, as a file has ten minutes.
import { test } from 'tap';
import { cudaDevice, openDevice } from '../../engine/device.ts';
import { openVirtualGpu } from '../virtual-gpu/gpu.ts';
import { controlledGradients, controlledSteps, modelErrors, unitedSteps } from './whole_models.ts';

test('the gradients of a ControlNet beside a frozen UNet', (t) => {
  const device = cudaDevice(openVirtualGpu({ races: false }));
  for (const { name, error, bound } of modelErrors(device, openDevice('cpu'), controlledGradients, 'float32'))
    t.ok(error <= bound, `${name}: ${error.toExponential(2)}, at most ${bound.toExponential(2)}`);
  t.end();
});

test('five steps, a ControlNet on in the middle three', (t) => {
  const device = cudaDevice(openVirtualGpu({ races: false }));
  for (const { name, error, bound } of modelErrors(device, openDevice('cpu'), controlledSteps, 'float32'))
    t.ok(error <= bound, `${name}: ${error.toExponential(2)}, at most ${bound.toExponential(2)}`);
  t.end();
});

test('two steps under a ControlNet union of two pictures', (t) => {
  const device = cudaDevice(openVirtualGpu({ races: false }));
  for (const { name, error, bound } of modelErrors(device, openDevice('cpu'), unitedSteps, 'float32'))
    t.ok(error <= bound, `${name}: ${error.toExponential(2)}, at most ${bound.toExponential(2)}`);
  t.end();
});
