from .covariance import (
    KERNELS as KERNELS,
    CovarianceError as CovarianceError,
    EigenGrid as EigenGrid,
    chordal_distance as chordal_distance,
    correlation as correlation,
    eigen_grid as eigen_grid,
    euclidean_distance as euclidean_distance,
    time_distance as time_distance,
)
from .frames import (
    FrameReparam as FrameReparam,
    MatrixAngularCentralGaussian as MatrixAngularCentralGaussian,
    SequentialConditioned as SequentialConditioned,
    SequentialProjected as SequentialProjected,
    UniformFrame as UniformFrame,
    gram_schmidt as gram_schmidt,
    stiefel as stiefel,
)

__all__ = [
    "KERNELS",
    "CovarianceError",
    "EigenGrid",
    "FrameReparam",
    "MatrixAngularCentralGaussian",
    "SequentialConditioned",
    "SequentialProjected",
    "UniformFrame",
    "chordal_distance",
    "correlation",
    "eigen_grid",
    "euclidean_distance",
    "gram_schmidt",
    "stiefel",
    "time_distance",
]
