// What bindings.cpp calls: one function for each launch or short sequence of launches. Pointers are addresses in the
// memory of `device`, 0 for what is not there; strides are in elements; each function launches on the stream and returns
// without waiting. What a pointer must point to stands at its name in the .cu file.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

using Pointer = std::uintptr_t;

// rms_norm.cu
void rms_norm_forward(
    int device, Pointer stream, const std::string& dtype, Pointer x, Pointer x0, Pointer x1, Pointer a, Pointer b,
    Pointer scale, Pointer y, Pointer h, Pointer rstd, Pointer q, Pointer first, std::int64_t stride_x,
    std::int64_t stride_x0, std::int64_t stride_x1, std::int64_t M, int N, int padded_first, float eps);
void rms_norm_backward(
    int device, Pointer stream, const std::string& dtype, Pointer dy, Pointer dh, Pointer dfirst, Pointer dx0_in,
    Pointer x, Pointer x0, Pointer x1, Pointer a, Pointer b, Pointer rstd, Pointer dx, Pointer dx0, Pointer da,
    Pointer db, std::int64_t stride_dy, std::int64_t stride_dh, std::int64_t stride_dfirst, std::int64_t stride_dx0_in,
    std::int64_t stride_x, std::int64_t stride_x0, std::int64_t stride_x1, std::int64_t M, int N, int first);
int rms_norm_backward_blocks(std::int64_t M, int N);  // numbers in da and in db

// lm_head_loss.cu
void lm_head_loss_rows(
    int device, Pointer stream, const std::string& dtype, const std::string& out_dtype, Pointer z, Pointer out,
    Pointer losses, Pointer targets, Pointer weights, Pointer factor, std::int64_t stride_z, std::int64_t stride_out,
    std::int64_t M, int vocab, int columns, int K, float gain, float offset, float height2, float steep, float limit,
    bool cap, bool fixed, std::int64_t most_shared);

// quantise_weight.cu
void quantise_weight(
    int device, Pointer stream, const std::string& dtype, Pointer w, Pointer q, Pointer q_t, Pointer scale,
    Pointer largest, std::int64_t n, std::int64_t R, std::int64_t C, std::int64_t columns_t, std::int64_t matrix_w,
    std::int64_t stride_w, std::int64_t matrix_q, std::int64_t stride_q, std::int64_t matrix_t, std::int64_t stride_t,
    float tiny);
std::int64_t quantise_weight_parts(std::int64_t n);  // numbers in largest
void fp8_transpose(
    int device, Pointer stream, const std::string& dtype, const std::string& q_dtype, Pointer x, Pointer q, Pointer q_t,
    Pointer scale, Pointer amax, std::int64_t n, std::int64_t R, std::int64_t C, std::int64_t columns_t,
    std::int64_t matrix_x, std::int64_t stride_x, std::int64_t matrix_q, std::int64_t stride_q, std::int64_t matrix_t,
    std::int64_t stride_t);

// adam_update.cu
struct AdamTensors {  // the arguments of one adam_update; n elements, rows of hyper
    Pointer p, low, g, exp_avg, exp_avg_sq, hyper, row;
    std::string p_dtype, g_dtype, moment_dtype;
    std::int64_t n;
    int rows;
};
void adam_update(int device, Pointer stream, const std::vector<AdamTensors>& tensors, float eps);

// muon_update.cu
struct MuonBank {  // the arguments of one muon_momentum or muon_apply, 0 and "float32" for those of the other
    Pointer g, buf, x, scale, p, low, second, lr_scale, hyper;
    std::string g_dtype, x_dtype, p_dtype;
    std::int64_t g_k, g_r, buf_k, buf_r, x_k, x_r, p_k, p_r, low_k, low_r;  // strides of matrices and rows
    int K, R, C;
    bool by_columns;  // Muon's rows, or those that `second` has numbers for, are stored columns
};
std::int64_t muon_workspace(const std::vector<MuonBank>& banks);  // fp32 numbers that the next two need beside them
void muon_momentum(int device, Pointer stream, const std::vector<MuonBank>& banks, Pointer workspace, float safety);
void muon_apply(int device, Pointer stream, const std::vector<MuonBank>& banks, Pointer workspace, float beta2);

#ifdef REDLINE_EMULATION
namespace emulation {
// emulation.h. This header alone: a sanitizer changes what is in the other, and the bindings are built without one
void set_order(const std::string& order, std::uint64_t seed);
}  // namespace emulation
#endif
