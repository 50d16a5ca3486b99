// The Python module of csrc/: csrc._cuda, which nvcc built, or _emulated, whose kernels run on the CPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "api.h"

namespace py = pybind11;
using namespace py::literals;

PYBIND11_MODULE(REDLINE_MODULE, m) {
    m.def("rms_norm_forward", &rms_norm_forward, py::kw_only(), "device"_a, "stream"_a, "dtype"_a, "x"_a, "x0"_a, "x1"_a,
          "a"_a, "b"_a, "scale"_a, "y"_a, "h"_a, "rstd"_a, "q"_a, "first"_a, "stride_x"_a, "stride_x0"_a,
          "stride_x1"_a, "M"_a, "N"_a, "padded_first"_a, "eps"_a);
    m.def("rms_norm_backward", &rms_norm_backward, py::kw_only(), "device"_a, "stream"_a, "dtype"_a, "dy"_a, "dh"_a,
          "dfirst"_a, "dx0_in"_a, "x"_a, "x0"_a, "x1"_a, "a"_a, "b"_a, "rstd"_a, "dx"_a, "dx0"_a, "da"_a, "db"_a,
          "stride_dy"_a, "stride_dh"_a, "stride_dfirst"_a, "stride_dx0_in"_a, "stride_x"_a, "stride_x0"_a,
          "stride_x1"_a, "M"_a, "N"_a, "first"_a);
    m.def("rms_norm_backward_blocks", &rms_norm_backward_blocks, "M"_a, "N"_a);
    m.def("lm_head_loss_rows", &lm_head_loss_rows, py::kw_only(), "device"_a, "stream"_a, "dtype"_a, "out_dtype"_a,
          "z"_a, "out"_a, "losses"_a, "targets"_a, "weights"_a, "factor"_a, "stride_z"_a, "stride_out"_a, "M"_a,
          "vocab"_a, "columns"_a, "K"_a, "gain"_a, "offset"_a, "height2"_a, "steep"_a, "limit"_a, "cap"_a, "fixed"_a,
          "most_shared"_a);
    m.def("quantise_weight", &quantise_weight, py::kw_only(), "device"_a, "stream"_a, "dtype"_a, "w"_a, "q"_a, "q_t"_a,
          "scale"_a, "largest"_a, "n"_a, "R"_a, "C"_a, "columns_t"_a, "matrix_w"_a, "stride_w"_a, "matrix_q"_a,
          "stride_q"_a, "matrix_t"_a, "stride_t"_a, "tiny"_a);
    m.def("quantise_weight_parts", &quantise_weight_parts, "n"_a);
    m.def("fp8_transpose", &fp8_transpose, py::kw_only(), "device"_a, "stream"_a, "dtype"_a, "q_dtype"_a, "x"_a,
          "q"_a, "q_t"_a, "scale"_a, "amax"_a, "n"_a, "R"_a, "C"_a, "columns_t"_a, "matrix_x"_a, "stride_x"_a,
          "matrix_q"_a, "stride_q"_a, "matrix_t"_a, "stride_t"_a);
    // types of this module alone: a mutant's module may be loaded beside it
    py::class_<AdamTensors>(m, "AdamTensors", py::module_local())
        .def(py::init<Pointer, Pointer, Pointer, Pointer, Pointer, Pointer, Pointer, std::string, std::string,
                      std::string, std::int64_t, int>(),
             py::kw_only(), "p"_a, "low"_a, "g"_a, "exp_avg"_a, "exp_avg_sq"_a, "hyper"_a, "row"_a, "p_dtype"_a,
             "g_dtype"_a, "moment_dtype"_a, "n"_a, "rows"_a);
    m.def("adam_update", &adam_update, py::kw_only(), "device"_a, "stream"_a, "tensors"_a, "eps"_a);
    py::class_<MuonBank>(m, "MuonBank", py::module_local())
        .def(py::init<Pointer, Pointer, Pointer, Pointer, Pointer, Pointer, Pointer, Pointer, Pointer, std::string,
                      std::string, std::string, std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                      std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t, int, int, int, bool>(),
             py::kw_only(), "g"_a = 0, "buf"_a = 0, "x"_a, "scale"_a = 0, "p"_a = 0, "low"_a = 0, "second"_a = 0,
             "lr_scale"_a = 0, "hyper"_a, "g_dtype"_a = "float32", "x_dtype"_a, "p_dtype"_a = "float32", "g_k"_a = 0,
             "g_r"_a = 0, "buf_k"_a = 0, "buf_r"_a = 0, "x_k"_a, "x_r"_a, "p_k"_a = 0, "p_r"_a = 0, "low_k"_a = 0,
             "low_r"_a = 0, "K"_a, "R"_a, "C"_a, "by_columns"_a);
    m.def("muon_workspace", &muon_workspace, "banks"_a);
    m.def("muon_momentum", &muon_momentum, py::kw_only(), "device"_a, "stream"_a, "banks"_a, "workspace"_a, "safety"_a);
    m.def("muon_apply", &muon_apply, py::kw_only(), "device"_a, "stream"_a, "banks"_a, "workspace"_a, "beta2"_a);
#ifdef REDLINE_EMULATION
    m.def("set_order", &emulation::set_order, "order"_a, "seed"_a = 0);
#endif
}
