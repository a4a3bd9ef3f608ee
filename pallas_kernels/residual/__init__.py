"""The residual block around attention: norms, products, dropout and additions as two functions."""

from pallas_kernels.residual.api import choose as choose
from pallas_kernels.residual.api import end as end
from pallas_kernels.residual.api import enter as enter
from pallas_kernels.residual.api import KEPT as KEPT
from pallas_kernels.residual.api import leave as leave
from pallas_kernels.residual.api import override as override
from pallas_kernels.residual.api import start as start
from pallas_kernels.residual.api import Stream as Stream
from pallas_kernels.residual.fold import after_norm as after_norm
from pallas_kernels.residual.fold import EnterWeights as EnterWeights
from pallas_kernels.residual.fold import joint as joint
from pallas_kernels.residual.fold import LeaveWeights as LeaveWeights
from pallas_kernels.residual.fold import linear as linear
from pallas_kernels.residual.options import Bits as Bits
from pallas_kernels.residual.options import Options as Options
from pallas_kernels.residual.xla import multiply as multiply
from pallas_kernels.residual.xla import weight_gradient as weight_gradient
