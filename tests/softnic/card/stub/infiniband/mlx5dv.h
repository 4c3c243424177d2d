// All that NVSHMEM's header of IBGDA's structures needs of mlx5's: the size of an address.
#pragma once
#include <linux/types.h>
struct mlx5_wqe_av {
  unsigned char bytes[48];
};
