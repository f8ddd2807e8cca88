// What micro-kernels of sm_90a share: their frame in PTX, and words between global and shared memory by all threads.

export const THREADS = 128;
export const onHopper = { group: 'hopper', hopper: true } as const;

export const kernel = (parameters: string, registers: string, body: string) => `.version 8.0
.target sm_90a
.address_size 64
.visible .entry op(${parameters})
{
.reg .pred %p<4>; .reg .b32 %t, %s, %b, %n, %x, %y, %z, %r<8>; .reg .b64 %m, %to, %from, %o, %w<8>; ${registers}
mov.u32 %t, %tid.x;
${body}
ret;
}`;

/** %n bytes between global %from or %to and shared memory from %s on, by all threads. */
export const copyWords = (label: string, move: string) => `shl.b32 %r1, %t, 2;
${label}: setp.ge.u32 %p1, %r1, %n; @%p1 bra ${label}_END; cvt.u64.u32 %o, %r1; add.s32 %r2, %s, %r1;
${move}
add.s32 %r1, %r1, ${4 * THREADS}; bra ${label};
${label}_END:`;
export const toShared = 'add.s64 %w3, %from, %o; ld.global.u32 %r3, [%w3]; st.shared.u32 [%r2], %r3;';
export const toGlobal = 'ld.shared.u32 %r3, [%r2]; add.s64 %w3, %to, %o; st.global.u32 [%w3], %r3;';
