"""The networks, one file each. Their module paths are part of the checkpoint format (`model_index.json`).

One legend of the dimensions that docstrings of this package name:

    B   samples of a call: photos, faces or views
    T   tasks of an inner loop, one person each             P   photos of a person (also: planes of a generator, 3)
    S   side of an image in pixels                          h   side of a rendering in rays, the raw image
    M   points, or rays, of a sample                        S   (behind M) samples along a ray
    R   side of a feature plane                             C   channels of a plane, or of a feature map
    r   side of an offset plane                             k   side of a convolution's kernel
    C_out, C_in  (O, I)  channels of a generator's layer    D   length of an embedding
    w_dim, z_dim, num_ws  lengths of w and z, number of w vectors that a generator takes
    V   views of one head                                   N   gradient steps of an inversion (K in training)

Cameras are [B, 25]: the camera-to-world matrix [4, 4] and the intrinsics [3, 3], row by row. The box that a generator
fills is one world unit wide. Images are RGB in [-1, 1], latent codes float32 [B, w_dim] or [B, num_ws, w_dim].
"""
