/* platform.h - the only file that knows which language the kernels are compiled as.

   CUDA C++ (NVRTC or nvcc, sm_75 and later) and OpenCL C 1.2 or later.  The kernel
   files use only the words defined here and the common subset of both languages.

   BLOCK     threads of a work-group; a multiple of 32 (CUDA) and of 8 (OpenCL)
   TID, BID  thread in its group, group in the grid; all launches are 1-D
   SHFL_XOR  value of the lane whose number differs by a mask below 8; all threads call it
   ANY8      nonzero when x is nonzero in any of the 8 lanes of a page; all threads call it
   LANES_DECL  storage SHFL_XOR and ANY8 need where the device has no shuffles */
#ifndef PLATFORM_H
#define PLATFORM_H

#ifndef BLOCK
#define BLOCK 128
#endif

#if defined(__OPENCL_VERSION__)
typedef ulong u64;
typedef long i64;
typedef uint u32;
typedef uchar u8;
#define KERNEL __kernel __attribute__((reqd_work_group_size(BLOCK, 1, 1))) void
#define GLOBAL __global
#define SHARED __local
#define RESTRICT restrict
#define DEVCONST __constant
#define DEVFN static inline
#define UNROLL __attribute__((opencl_unroll_hint))
#define TID ((u32)get_local_id(0))
#define BID ((u32)get_group_id(0))
#define NBLOCKS ((u32)get_num_groups(0))
#define BARRIER() barrier(CLK_LOCAL_MEM_FENCE)
#define MULHI64(a, b) mul_hi((u64)(a), (u64)(b))
#if defined(SUBGROUPS)
/* Sub-groups hold at least 8 consecutive threads on every device that has shuffles;
   the known-answer test at start refuses a device for which that does not hold. */
#pragma OPENCL EXTENSION cl_khr_subgroup_shuffle : enable
#define LANES_DECL
#define SHFL_XOR(x, mask) sub_group_shuffle_xor((u64)(x), (u32)(mask))
#define ANY8(x) any8(x)
static inline u64 any8(u64 x) {
  x |= SHFL_XOR(x, 1);
  x |= SHFL_XOR(x, 2);
  return x | SHFL_XOR(x, 4);
}
#else
#define LANES_DECL __local u64 lanes[BLOCK];
#define SHFL_XOR(x, mask) shfl_xor(lanes, (x), (mask))
#define ANY8(x) any8(lanes, (x))
static inline u64 shfl_xor(__local u64 *lanes, u64 x, u32 mask) {
  const u32 thread = (u32)get_local_id(0);
  barrier(CLK_LOCAL_MEM_FENCE); /* the values of the exchange before have been read */
  lanes[thread] = x;
  barrier(CLK_LOCAL_MEM_FENCE);
  return lanes[thread ^ mask];
}
static inline u64 any8(__local u64 *lanes, u64 x) {
  x |= shfl_xor(lanes, x, 1);
  x |= shfl_xor(lanes, x, 2);
  return x | shfl_xor(lanes, x, 4);
}
#endif

#elif defined(__CUDACC__) || defined(__CUDACC_RTC__)
typedef unsigned long long u64;
typedef long long i64;
typedef unsigned int u32;
typedef unsigned char u8;
#define KERNEL extern "C" __global__ void __launch_bounds__(BLOCK)
#define GLOBAL
#define SHARED __shared__
#define RESTRICT __restrict__
#define DEVCONST __device__ const
#define DEVFN static __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define TID threadIdx.x
#define BID blockIdx.x
#define NBLOCKS gridDim.x
#define BARRIER() __syncthreads()
#define MULHI64(a, b) __umul64hi((a), (b))
#define LANES_DECL
#define SHFL_XOR(value, mask) __shfl_xor_sync(0xffffffffu, (u64)(value), (mask))
#define ANY8(value) (__ballot_sync(0xffffffffu, (value) != 0) >> (threadIdx.x & 24u) & 0xffu)

#else
#error "platform.h knows CUDA and OpenCL only"
#endif

/* A pointer to shared memory carries its address space in OpenCL, not in CUDA. */
#if defined(__OPENCL_VERSION__)
#define SHAREDPTR __local
#else
#define SHAREDPTR
#endif

#endif
