"""What a cell computes in one time step, and the adjoint of that step: see `cell.CellFunctions`.

The RNN saves nothing but its output, and gets that as its one saved tile. GRU uses its four slots
as (r, z, n, W_hn h + b_hn): the reset gate multiplies the recurrent part of n only, so that part
needs a slot of its own. On the way back they are (dr, dz, dn, r dn).
"""

import triton
import triton.language as tl

from fused_rnn.kernels.cell import CellFunctions
from fused_rnn.kernels.tiles import sigmoid, tanh


@triton.jit
def rnn_tanh_step(pre, state, params, FAST: tl.constexpr):
    h = tanh(pre[0], FAST)
    return (h,), (h,)


@triton.jit
def rnn_tanh_factors(saved, now, before, params, FAST: tl.constexpr):
    return (1.0 - saved[0] * saved[0],)


@triton.jit
def rnn_relu_step(pre, state, params, FAST: tl.constexpr):
    h = tl.where(pre[0] <= 0, 0.0, pre[0])  # written so that a NaN stays one, as in torch.relu
    return (h,), (h,)


@triton.jit
def rnn_relu_factors(saved, now, before, params, FAST: tl.constexpr):
    return (tl.where(saved[0] > 0, 1.0, 0.0),)


@triton.jit
def rnn_adjoint(k, grads, none):
    return (grads[0] * k[0],), (none,), ()


@triton.jit
def gru_step(pre, state, params, FAST: tl.constexpr):
    r = sigmoid(pre[0], FAST)
    z = sigmoid(pre[1], FAST)
    n = tanh(pre[2] + r * pre[3], FAST)
    h = n + z * (state[0] - n)
    return (r, z, n, pre[3]), (h,)


@triton.jit
def gru_factors(saved, now, before, params, FAST: tl.constexpr):
    r, z, n, q = saved
    dn = (1.0 - z) * (1.0 - n * n)
    dq = dn * r
    return dq * q * (1.0 - r), (before[0] - n) * z * (1.0 - z), dn, dq, z


@triton.jit
def gru_adjoint(k, grads, none):
    dh = grads[0]
    return (dh * k[0], dh * k[1], dh * k[2], dh * k[3]), (dh * k[4],), ()


@triton.jit
def lstm_step(pre, state, params, FAST: tl.constexpr):
    i = sigmoid(pre[0], FAST)
    f = sigmoid(pre[1], FAST)
    g = tanh(pre[2], FAST)
    o = sigmoid(pre[3], FAST)
    c = f * state[1] + i * g
    return (i, f, g, o), (o * tanh(c, FAST), c)


@triton.jit
def lstm_others(saved, before, params, FAST: tl.constexpr):
    return (saved[1] * before[1] + saved[0] * saved[2],)


@triton.jit
def lstm_factors(saved, now, before, params, FAST: tl.constexpr):
    i, f, g, o = saved
    y = tanh(now[0], FAST)
    di = g * i * (1.0 - i)
    df = before[1] * f * (1.0 - f)
    return di, df, i * (1.0 - g * g), y * o * (1.0 - o), o * (1.0 - y * y), f


@triton.jit
def lstm_adjoint(k, grads, none):
    dh = grads[0]
    dc = grads[1] + dh * k[4]
    return (dc * k[0], dc * k[1], dc * k[2], dh * k[3]), (none, dc * k[5]), ()


RNN_TANH = CellFunctions(rnn_tanh_step, rnn_tanh_factors, rnn_adjoint)
RNN_RELU = CellFunctions(rnn_relu_step, rnn_relu_factors, rnn_adjoint)
GRU = CellFunctions(gru_step, gru_factors, gru_adjoint)
LSTM = CellFunctions(lstm_step, lstm_factors, lstm_adjoint, lstm_others)
