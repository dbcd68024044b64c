"""The cases of every op, and which implementations take them in which tier.

The fast tier has every option and every kind of block; the slow one the pairs
of options, the lengths and the widths besides. What is interpreted is slow:
the fast tier has what a mistake in a kernel is most likely to break.
"""

import math

import jax.numpy as jnp

from attention.kernels.scores import weights
from attention.kernels.scores.fire import Fire
from tests.kernels.measure import TOLERANCE
from tests.kernels.ops import Chunked, Delta, Flash, Scan, Scores

NATIVE = dict(fast='xla plain', slow='tpu gpu')
PAIRS = dict(slow='xla plain tpu gpu')
TILES = dict(fast='tiles', slow='tpu')
PACKED = 'q_ids kv_ids'
BIAS = 'row_bias column_bias'
BIASED = dict(fast='xla plain')  # The others decline it.
BIASED_TILES = dict(fast='tiles')

FLASH = (
    Flash(id='one token', T=1, **NATIVE),
    Flash(id='causal', **NATIVE),
    Flash(id='T100', T=100, **PAIRS),
    Flash(id='T257', T=257, fast='tiles', slow='xla plain tpu gpu'),
    Flash(id='bidirectional', causal=False, **PAIRS),
    Flash(id='multi-query', K=1, **PAIRS),
    Flash(id='multi-head', K=4, **PAIRS),
    Flash(id='one head', N=1, K=1, **PAIRS),
    Flash(id='wide values', V=32, **PAIRS),
    Flash(id='narrow values', H=24, V=8, fast='xla plain', slow='tpu'),
    Flash(id='narrow values in 16s', H=32, V=16, slow='gpu'),
    Flash(id='window 1', window=1, **PAIRS),
    Flash(id='window', window=9, **PAIRS),
    Flash(id='softcap', softcap=2.0, **NATIVE),
    Flash(id='segments', has=PACKED, **NATIVE),
    Flash(id='sink', has='sink', **PAIRS),
    Flash(id='window softcap', window=9, softcap=2.0, **PAIRS),
    Flash(id='window segments', window=9, has=PACKED, **PAIRS),
    Flash(id='window sink', window=9, has='sink', **PAIRS),
    Flash(id='softcap segments', softcap=2.0, has=PACKED, **PAIRS),
    Flash(id='softcap sink', softcap=2.0, has='sink', **PAIRS),
    Flash(id='segments sink', has=f'{PACKED} sink', **PAIRS),
    Flash(id='everything', T=100, V=32, window=9, softcap=2.0,
          has=f'{PACKED} sink', **NATIVE),
    Flash(id='everything T257', T=257, K=1, V=32, window=100, softcap=2.0,
          has=f'{PACKED} sink', fast='tiles tpu', slow='xla plain gpu'),
    Flash(id='everything offset', T=130, keys=290, N=2, K=1, H=32, V=64,
          q_offset=160, window=150, softcap=2.0, has=f'{PACKED} sink',
          fast='gpu', slow='tiles tpu'),
    Flash(id='bidirectional everything', V=32, causal=False, softcap=2.0,
          has=f'{PACKED} sink', **NATIVE),
    Flash(id='bidirectional long', T=100, keys=257, causal=False, has='sink',
          **TILES),
    Flash(id='bidirectional traced', T=63, keys=128, causal=False,
          has='q_offset', slow='tpu'),
    Flash(id='chunk', keys=100, q_offset=37, **PAIRS),
    Flash(id='chunk traced', keys=100, q_offset=37, has='q_offset', **NATIVE),
    Flash(id='chunk window', keys=257, window=70, q_offset=150, has='sink',
          **NATIVE),
    Flash(id='chunk window traced', keys=257, window=70, q_offset=150,
          has='sink q_offset', **PAIRS),
    Flash(id='chunk aligned', T=100, keys=257, q_offset=128,
          cut=dict(mxu_sums=True), slow='tpu'),
    Flash(id='chunk long', T=100, keys=257, q_offset=100, window=150,
          slow='tiles tpu'),
    Flash(id='chunk long traced', T=100, keys=257, q_offset=100, window=150,
          has='q_offset', **TILES),
    Flash(id='grouped window', T=257, K=1, window=70, slow='tiles tpu'),
    Flash(id='cross', T=100, keys=63, causal=False, **NATIVE),
    Flash(id='decode', T=1, keys=257, q_offset=200, has='sink q_offset',
          **NATIVE),
    Flash(id='decode window', T=3, keys=257, q_offset=180, window=90,
          has='q_offset', fast='xla plain tiles', slow='gpu tpu'),
    Flash(id='decode segments', T=1, keys=257, q_offset=256,
          has=f'{PACKED} sink', **TILES),
    Flash(id='empty rows', keys=100, q_offset=-20, has='sink', **NATIVE),
    Flash(id='empty rows traced', keys=100, q_offset=-20,
          has='sink q_offset', slow='xla plain tpu gpu'),
    Flash(id='empty rows window', T=100, keys=63, q_offset=5, window=9,
          **PAIRS),
    Flash(id='empty blocks traced', T=200, keys=100, q_offset=-70,
          has='sink q_offset', fast='tiles tpu'),
    Flash(id='all rows empty', q_offset=-100, has='sink', **PAIRS),
    Flash(id='bias one token', T=1, has=BIAS, **BIASED),
    Flash(id='bias', has=BIAS, **BIASED),
    Flash(id='bias long', T=257, K=1, A=1, has=BIAS, **BIASED_TILES),
    Flash(id='bias bidirectional', causal=False, T=100, keys=63, A=4, has=BIAS,
          fast='xla plain tiles'),
    Flash(id='bias window', T=257, window=70, has=BIAS, **BIASED_TILES),
    Flash(id='bias softcap', softcap=2.0, has=f'{BIAS} sink', **BIASED),
    Flash(id='bias everything', T=257, V=32, window=100, softcap=2.0,
          has=f'{BIAS} {PACKED} sink', fast='xla plain tiles'),
    Flash(id='bias chunk', T=100, keys=257, q_offset=128,
          has=f'{BIAS} sink', **BIASED_TILES),
    Flash(id='bias chunk traced', T=63, keys=257, q_offset=150, window=70,
          has=f'{BIAS} q_offset', fast='xla plain tiles'),
    Flash(id='bias decode', T=1, keys=257, K=1, q_offset=200,
          has=f'{BIAS} {PACKED} sink q_offset', fast='xla plain tiles'),
    Flash(id='bias empty rows', T=200, keys=100, q_offset=-70,
          has=f'{BIAS} sink', fast='xla plain tiles'),
    Flash(id='bfloat16', T=100, window=40, has='sink', dtype=jnp.bfloat16,
          fast='xla plain'),
    # How a TPU kernel may be cut otherwise; None is as it cuts itself.
    Flash(id='sums by the matrix unit', T=200, K=1, V=24, window=100,
          has=f'{PACKED} sink', cut=dict(mxu_sums=True), slow='tpu'),
    Flash(id='keys that do not fit in VMEM', T=257, K=1, window=150,
          has=f'{PACKED} sink', cut=dict(most_keys=128), slow='tpu'),
    Flash(id='bfloat16 on v5e', T=200, window=100, H=64, V=64, has='sink',
          chip='v5e', dtype=jnp.bfloat16, cut=None, fast='tpu'),
    Flash(id='bfloat16 on v6e', T=257, window=100, H=64, V=64, has='sink',
          chip='v6e', dtype=jnp.bfloat16, cut=None, slow='tpu'),
    Flash(id='blocks of the table', T=700, H=64, V=32, cut=None, slow='tpu'),
    Flash(id='packed blocks of the table', T=700, N=2, K=1, H=32, V=64,
          window=300, has=PACKED, cut=None, slow='tpu'),
    # Scores are sums of H float32 products: at 256 their rounding shows in dq.
    *(Flash(id=f'H{H}', T=200, N=2, K=1, H=H, V=H // 2,
            tolerance=3e-6 if H == 256 else TOLERANCE, slow='tpu')
      for H in (32, 80, 96, 192, 256)),
    # Several blocks of the Hopper kernels, ragged, full ones among them.
    Flash(id='causal T300', T=300, N=2, K=1, H=64, V=64, slow='gpu'),
    Flash(id='float16', T=200, window=70, has='sink', dtype=jnp.float16,
          slow='gpu'),
    Flash(id='long', T=520, N=1, K=1, H=64, V=64, slow='gpu'),
    Flash(id='long window', T=520, N=1, K=1, H=128, V=128, window=200,
          slow='gpu'),
    Flash(id='long segments', T=520, N=2, K=1, H=64, V=64, has=PACKED,
          slow='gpu'),
    Flash(id='long bidirectional', T=100, keys=520, N=1, K=1, H=64, V=128,
          causal=False, slow='gpu'),
    *(Flash(id=f'{H} by {V}', T=200, N=2, K=1, H=H, V=V, softcap=2.0,
            slow='gpu')
      for H, V in ((80, 80), (96, 32), (192, 128), (256, 256))),
)

ALL = 'z dt_bias h0 starts'
# Nothing, 1e-30, and A * step = -50 and far beyond.
EXTREME_STEPS = dict(
    has='z h0', dt_softplus=False, steps=(0.0, 1e-30, 1.0, 50.0, 1e4))

SCAN = (
    Scan(id='one step', T=1, has=ALL, fast='xla gpu', slow='tpu'),
    Scan(id='bare', T=257, M=8, fast='xla', slow='tpu gpu'),
    Scan(id='packed', has='starts h0', slow='xla'),
    Scan(id='everything', T=100, has=ALL, fast='xla', slow='tpu'),
    # Blocks of 128 channels of a row, the last one not whole.
    Scan(id='everything in blocks', T=20, E=140, has=ALL, races=True,
         cut=dict(states=8 * 128), fast='tpu'),
    Scan(id='everything M16', T=63, M=16, has=ALL, slow='gpu'),
    Scan(id='T257', T=257, has='dt_bias h0', slow='xla tpu gpu'),
    Scan(id='T1024', B=1, T=1024, has='z starts', slow='tpu'),
    Scan(id='without softplus', has='z h0', dt_softplus=False, fast='xla',
         slow='tpu gpu'),
    Scan(id='input as it is', has=ALL, scale_input=False, fast='xla',
         slow='tpu gpu'),
    Scan(id='input as it is in blocks', T=40, E=140, M=1, has='h0 starts',
         dt_softplus=False, scale_input=False, cut=dict(states=8 * 128),
         slow='tpu'),
    Scan(id='input as it is in parts', T=40, M=1, has='h0 starts',
         dt_softplus=False, scale_input=False, cut=dict(parts=3), slow='gpu'),
    Scan(id='extreme steps', **EXTREME_STEPS, fast='xla', slow='tpu gpu'),
    Scan(id='vanishing steps', T=20, has='h0', steps=(-200.0,),
         slow='xla tpu gpu'),
    # log(1 + e^dt) is e^dt here: an addition to 1 would lose it.
    Scan(id='small steps', T=20, has='h0', steps=(-17.0, -15.5, -19.0),
         slow='xla tpu gpu'),
    Scan(id='bfloat16', B=1, T=20, has='z h0', dtype=jnp.bfloat16,
         fast='xla', slow='gpu tpu'),
    Scan(id='float16', T=40, has='z h0', dtype=jnp.float16, slow='gpu'),
    # Several blocks of channels and chunks, none of them whole at the end.
    Scan(id='blocks and chunks', B=1, T=150, E=200, has='starts h0',
         cut=dict(states=8 * 128), slow='tpu'),
    # One row and four blocks: two halves of the channels for two cores.
    Scan(id='two cores', B=1, T=20, E=500, has='z dt_bias h0', races=True,
         cut=dict(states=8 * 128), slow='tpu'),
    *(Scan(id=f'M{M}', B=1, T=40, E=13, M=M, has='z h0 starts', slow='tpu')
      for M in (8, 16, 20, 32, 64)),
    # Hopper: 128 channels a block, 16 states a tile, time in parts.
    Scan(id='parts', T=40, has=ALL, cut=dict(parts=3), fast='gpu'),
    Scan(id='parts everywhere', T=100, E=8, M=16, has=ALL, cut=dict(parts=7),
         slow='gpu'),
    Scan(id='parts of M20', T=40, M=20, has=ALL, cut=dict(parts=2),
         slow='gpu'),
    Scan(id='extreme steps in parts', **EXTREME_STEPS, cut=dict(parts=2),
         slow='gpu'),
    Scan(id='blocks of threads', T=20, E=131, M=16, has=ALL,
         cut=dict(parts=2), slow='gpu'),
    Scan(id='M64 in tiles', T=20, M=64, has='z h0 starts', slow='gpu'),
)

STATE = 's0 z0'
FULL = f'decay {STATE} starts'
HOPPER = dict(N=2, K=1, H=16, V=32)  # What the tensor cores take.
NORMAL = dict(normalize=1e-6)
SHARED = dict(shared='q k')
# A small decay keeps its digits next to one that forgets everything.
EXTREME_DECAYS = (-100.0, -0.01, 0.0, -1e4, -1e-3, -jnp.inf, -0.1)

CHUNKED = (
    Chunked(id='one step', T=1, per_head=True, **NORMAL, has=FULL, fast='xla',
            slow='tpu'),
    Chunked(id='one linear step', T=1, has='s0', slow='tpu'),
    Chunked(id='bare', fast='xla', slow='tpu'),
    Chunked(id='normalized', **NORMAL, slow='xla tpu'),
    Chunked(id='normalized state', **NORMAL, has=STATE, slow='tpu'),
    Chunked(id='linear', T=100, **NORMAL, has=f'{STATE} starts', fast='xla',
            slow='tpu'),
    Chunked(id='packed', T=100, has='s0 starts', slow='xla tpu'),
    Chunked(id='packed head decay', has='decay s0 starts', per_head=True,
            slow='tpu'),
    Chunked(id='step decay', T=100, has='decay s0', fast='xla', slow='tpu'),
    Chunked(id='step decay packed', T=100, has='decay s0 starts',
            slow='xla tpu'),
    Chunked(id='head decay', T=257, has=f'decay {STATE}', per_head=True,
            **NORMAL, slow='xla tpu'),
    Chunked(id='everything', T=100, N=2, K=1, has=FULL, **NORMAL, fast='tpu',
            slow='xla'),
    Chunked(id='everything T257', T=257, has=FULL, **NORMAL, cut=None,
            fast='xla', slow='tpu'),
    Chunked(id='one document of 1024', T=1024, has=f'decay {STATE}', **NORMAL,
            cut=None, slow='tpu'),
    # Four query heads of a key head, two of them in a program.
    Chunked(id='shared state', T=100, K=1, has=f'decay {STATE}', **NORMAL,
            cut=dict(rows=128), slow='tpu'),
    # Mamba-2: queries and keys of some heads, values and decays of each.
    Chunked(id='shared queries and keys', T=100, N=6, K=6, J=2, **SHARED,
            has='decay s0 starts', fast='xla', slow='tpu'),
    Chunked(id='shared by all', T=257, K=4, **SHARED, has='decay s0',
            slow='xla tpu'),
    Chunked(id='shared by all in one chunk', T=12, N=8, K=8, H=64, V=8,
            **SHARED, fast='xla'),
    Chunked(id='shared without decay', K=4, J=2, **SHARED, **NORMAL, has=STATE,
            slow='xla tpu'),
    Chunked(id='shared and everything', T=100, K=4, J=2, **SHARED, **NORMAL,
            has=FULL, fast='xla', slow='tpu'),
    Chunked(id='shared keys of grouped queries', T=100, N=8, K=4, J=2,
            shared='k', has=FULL, **NORMAL, fast='xla', slow='tpu'),
    Chunked(id='shared keys, several programs', T=100, N=8, J=1, shared='k',
            has='decay s0', cut=dict(rows=64), slow='tpu'),
    Chunked(id='shared queries alone', T=100, K=4, J=2, shared='q',
            has='decay s0 starts', slow='xla tpu'),
    Chunked(id='extreme decays', T=100, has='decay s0', decays=EXTREME_DECAYS,
            fast='xla', slow='tpu'),
    Chunked(id='bfloat16', has='s0', dtype=jnp.bfloat16, fast='xla',
            slow='tpu'),
    # S, dS and the weights are rounded too, where a product takes them.
    Chunked(id='bfloat16 plain', T=200, H=64, V=64, has='s0',
            dtype=jnp.bfloat16, slow='tpu'),
    Chunked(id='bfloat16 normalized', T=200, H=64, V=64, has=STATE, **NORMAL,
            dtype=jnp.bfloat16, slow='tpu'),
    Chunked(id='bfloat16 decay', T=200, H=64, V=64, has='decay s0',
            dtype=jnp.bfloat16, slow='tpu'),
    Chunked(id='bfloat16 everything', T=200, H=64, V=64,
            has=f'decay {STATE}', **NORMAL, dtype=jnp.bfloat16, slow='tpu'),
    Chunked(id='hopper everything', T=100, has=FULL, **NORMAL, **HOPPER,
            fast='gpu'),
    Chunked(id='hopper bare', **HOPPER, slow='gpu'),
    Chunked(id='hopper T257', T=257, **HOPPER, slow='gpu'),
    Chunked(id='hopper one step', T=1, has=FULL, **NORMAL, **HOPPER,
            slow='gpu'),
    Chunked(id='hopper normalized', **NORMAL, **HOPPER, slow='gpu'),
    Chunked(id='hopper linear', T=100, has=f'{STATE} starts', **NORMAL,
            **HOPPER, slow='gpu'),
    Chunked(id='hopper step decay', T=100, has='decay s0 starts', **HOPPER,
            slow='gpu'),
    Chunked(id='hopper head decay', T=257, has=f'decay {STATE}',
            per_head=True, **NORMAL, **HOPPER, slow='gpu'),
    Chunked(id='hopper extreme decays', T=100, has='decay s0',
            decays=EXTREME_DECAYS, **HOPPER, slow='gpu'),
    Chunked(id='hopper extreme decays packed', T=100, has='decay s0 starts',
            decays=EXTREME_DECAYS, **HOPPER, slow='gpu'),
    Chunked(id='hopper shared', T=130, N=6, K=6, J=2, H=32, V=16, **SHARED,
            has='decay s0 starts', slow='gpu'),
    Chunked(id='hopper shared and everything', T=100, N=4, K=4, J=2, H=16,
            V=32, **SHARED, **NORMAL, has=FULL, slow='gpu'),
    Chunked(id='hopper shared keys of grouped queries', T=100, N=8, K=4, J=2,
            H=16, V=32, shared='k', has=FULL, **NORMAL, slow='gpu'),
    Chunked(id='hopper shared queries alone', N=4, K=4, J=2, H=16, V=32,
            shared='q', has='s0 starts', slow='gpu'),
    *(Chunked(id=f'hopper {H} by {V}', T=130, N=N, K=K, H=H, V=V, has=FULL,
              **NORMAL, slow='gpu')
      for H, V, N, K in (
          (64, 64, 4, 2), (128, 64, 2, 2), (80, 128, 3, 1), (96, 48, 2, 1))),
)

RULE = 'beta decay s0'
XLA, SLOW_XLA = dict(fast='xla'), dict(slow='xla')
CHANNELS = dict(channels=True)

DELTA = (
    Delta(id='one step', T=1, has=f'{RULE} starts', **XLA),
    Delta(id='one step of channels', T=1, has=f'{RULE} starts', **CHANNELS,
          **XLA),
    Delta(id='bare', **XLA),
    Delta(id='packed', T=100, has='s0 starts', **SLOW_XLA),
    Delta(id='rule', T=257, has='beta s0', **XLA),
    Delta(id='rule packed', T=100, has='beta s0 starts', **SLOW_XLA),
    Delta(id='decay', has='decay s0', **SLOW_XLA),
    Delta(id='decay packed', T=100, has='decay s0 starts', **SLOW_XLA),
    Delta(id='rule and decay', T=64, has=RULE, **XLA),
    Delta(id='everything', T=100, has=f'{RULE} starts', **XLA),
    Delta(id='everything T257', T=257, K=1, has=f'{RULE} starts', **SLOW_XLA),
    Delta(id='channels', T=65, has='decay s0', **CHANNELS, **XLA),
    Delta(id='channels packed', T=257, has='decay s0 starts', **CHANNELS,
          **SLOW_XLA),
    Delta(id='rule and channels', has=RULE, **CHANNELS, **SLOW_XLA),
    Delta(id='everything by channel', T=100, has=f'{RULE} starts', **CHANNELS,
          **XLA),
    Delta(id='multi-query', T=257, K=1, has=RULE, **CHANNELS, **SLOW_XLA),
    Delta(id='multi-head', T=20, N=3, K=3, H=16, V=32, has=RULE, **CHANNELS,
          **SLOW_XLA),
    *(Delta(id=f'extreme decays{" by channel" * channels}{" packed" * packed}',
            T=100, has=RULE + ' starts' * packed, channels=channels,
            decays=EXTREME_DECAYS, fast='xla' if channels else '',
            slow='' if channels else 'xla')
      for channels in (False, True) for packed in (False, True)),
    Delta(id='no decay at all', T=100, has=RULE, decays=(0.0,), **CHANNELS,
          **SLOW_XLA),
    # The gradient of a decay is a difference, here one that should be zero.
    Delta(id='nothing is kept', T=100, has=RULE, decays=(-jnp.inf,), **CHANNELS,
          tolerance=1e-4, **SLOW_XLA),
    # The triangular systems at their worst: what reflects has sums of 2, -2, 2.
    Delta(id='one key', T=257, has='beta s0', same_keys=True, betas=(1.0,),
          **XLA),
    Delta(id='one key, reflected', T=257, has='beta s0', same_keys=True,
          betas=(2.0,), tolerance=1e-4, **XLA),
    Delta(id='betas at their ends', T=100, has=f'{RULE} starts',
          betas=(0.0, 2.0, 1.0, 2.0, 0.0, 1e-30), **CHANNELS, **XLA),
    Delta(id='bfloat16', T=100, has=RULE, dtype=jnp.bfloat16, **CHANNELS,
          **XLA),
)

BOTH = dict(fast='xla plain')
LEARNED = 'first second'
FIRE = 'c multiplier w1 b1 w2 b2 positions'

SCORES = (
    Scores(id='one token', T=1, **BOTH),
    Scores(id='softmax', slow='xla plain'),
    Scores(id='sink', weigh=weights.Softmax(math.e), has='first', **BOTH),
    Scores(id='everything', T=100, window=20, softcap=2.0, by_length=True,
           has=f'{PACKED} {LEARNED} {FIRE}', fire=Fire(1.0, 16.0, False),
           weigh=weights.Strongermax(2.5, True, 2.0, 0.8, None), **BOTH),
    Scores(id='chunk', keys=100, q_offset=37, window=50, by_length=True,
           weigh=weights.Softplus(4.0), **BOTH),
    Scores(id='bias', T=100, keys=257, q_offset=157, softcap=2.0, K=1,
           has=f'{BIAS} {PACKED}', weigh=weights.Softplus(4.0), **BOTH),
    Scores(id='empty rows', keys=100, q_offset=-20, slow='xla plain'),
    # What fire learns are sums over all pairs of tokens.
    Scores(id='multi-query', K=1, T=257, fire=Fire(1.5, 4.0, True), has=FIRE,
           tolerance=5e-5, slow='xla plain'),
    *(Scores(id=type(weigh).__name__.lower(), weigh=weigh, has=has,
             slow='xla plain')
      for weigh, has in (
          (weights.Sigsoftmax(2.0), ''),
          (weights.Strongermax(3.0, False, 2.0, None, None), LEARNED),
          (weights.Consmax(math.e, 0.5), LEARNED),
          (weights.Polymax(-0.5, 1.0, 1.5, 10.0, False), ''),
          (weights.ExpPolymax(2.0, 1.0, 3.0, 10.0), ''),
          (weights.Relumax(2, 10.0), ''),
          (weights.Sigmoidmax(10.0), ''),
          (weights.Squareplus(10.0), ''))),
    Scores(id='bfloat16', has=PACKED, dtype=jnp.bfloat16, slow='xla plain'),
)

ROWS = FLASH + SCAN + CHUNKED + DELTA + SCORES
