"""Logistic regression of digits by Newton's method, its steps from conjugate gradients; scikit-learn finds the same.

The Hessian is never there: `linear_ggn_vector_product` multiplies with it, in one pass over the rows.
"""

import jax
import jax.numpy as jnp
from jax.scipy.sparse.linalg import cg
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from jaxent import linear_ggn_vector_product, linear_softmax_cross_entropy

images, labels = load_digits(return_X_y=True)
x, y = jnp.asarray(images / 16), jnp.asarray(labels)
RIDGE = 1e-3


def loss(kernel):
    return RIDGE / 2 * jnp.sum(kernel**2) + linear_softmax_cross_entropy(x, kernel, y)


@jax.jit
def newton_step(kernel):
    """The Gauss-Newton matrix of a model that is linear in its parameters is the Hessian."""

    def curvature(v):
        return linear_ggn_vector_product(x, kernel, (None, v))[1] + RIDGE * v

    gradient = jax.grad(loss)(kernel)
    step, _ = cg(curvature, gradient, tol=1e-3, maxiter=100)
    return kernel - step, jnp.linalg.norm(gradient)


kernel = jnp.zeros((64, 10))
for count in range(8):
    kernel, slope = newton_step(kernel)
    print(f"step {count}: gradient {slope:.1e}")

assert jnp.linalg.norm(jax.grad(loss)(kernel)) < 1e-6
peer = LogisticRegression(C=1 / (RIDGE * len(x)), fit_intercept=False, solver="newton-cg", tol=1e-6)
assert jnp.allclose(kernel, peer.fit(images / 16, labels).coef_.T, atol=1e-3)
