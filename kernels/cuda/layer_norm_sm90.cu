// norm.cu's layer norm for Hopper, where it begins before the kernel before it has ended: a step of the base UNet has 210 of them,
// most between two products that do. Weight and bias, which no L2 holds since the last step, are asked for meanwhile.
#include "layer_norm.cuh"
#include "sm90.cuh"

LAYER_NORM_KERNEL(layer_norm_sm90_forward)(LAYER_NORM) {
  launch_dependents();
  for (int k = threadIdx.x * 128 / int(sizeof(T)); k < c; k += THREADS * 128 / int(sizeof(T))) prefetch_line(weight + k), prefetch_line(bias + k);
  wait_for_prerequisites();
  layer_norm(y, mean, rstd, x, weight, bias, rows, c, eps);
}
