"""The operations of aten that networks are made of: arithmetic on tensors. None opens a file."""

_NAMES = """
abs adaptive_avg_pool1d _adaptive_avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d add add_ addcmul addmm alias all
amax amin any arange argmax argmin _assert_scalar _assert_tensor_metadata avg_pool1d avg_pool2d baddbmm batch_norm
bitwise_not bmm cat ceil celu chunk clamp clamp_ clamp_max clamp_min clone col2im constant_pad_nd contiguous conv1d
conv2d conv3d conv_transpose2d convolution copy copy_ cos cumsum detach div div_ dropout dropout_ einsum elu elu_ eq
erf exp expand expand_as feature_dropout fill fill_ flatten flip floor full full_like gather ge gelu gelu_ glu
grid_sampler group_norm gt hardsigmoid hardsigmoid_ hardswish hardswish_ hardtanh hardtanh_ im2col index index_select
instance_norm layer_norm le leaky_relu leaky_relu_ lift_fresh_copy linalg_vector_norm linear log log2 log_softmax
logical_and logical_not logical_or lstm lt masked_fill matmul max max_pool2d maximum mean meshgrid min minimum mish
mish_ mm mul mul_ narrow native_batch_norm _native_batch_norm_legit_no_training native_group_norm native_layer_norm ne
neg new_full new_ones new_zeros norm numpy_T ones ones_like pad permute pixel_shuffle pixel_unshuffle pow prelu
reciprocal reflection_pad2d relu relu_ relu6 relu6_ repeat repeat_interleave replication_pad2d reshape reshape_as
rms_norm roll round rsqrt rsub scaled_dot_product_attention select selu sigmoid sigmoid_ sign silu silu_ sin slice
_softmax softmax softplus sort split split_with_sizes sqrt square squeeze stack std sub sub_ sum
sym_constrain_range_for_size sym_numel sym_size t tanh tanh_ tile to _to_copy topk transpose tril triu type_as unbind
unflatten unfold unsqueeze upsample_bicubic2d _upsample_bicubic2d_aa upsample_bilinear2d _upsample_bilinear2d_aa
upsample_nearest2d var var_mean view view_as where zeros zeros_like
"""
ATEN = frozenset(_NAMES.split())
