// The tuned numbers of int8 convolutions by Winograd, each with its reason. Measured on Zen 4 unless it says otherwise.
#pragma once

namespace lamina::tuning {

// Tiles whose products of a panel are held at once: one high tile of the product, and 65 KB.
inline constexpr int kInt8WinogradTiles = 14;

// Bytes of transformed inputs that a panel passes over, once it is transformed. They may leave L2, since a product
// takes two bytes of them a cycle; at 512 KB 256 channels of 128 tiles lose 10% to more passes.
inline constexpr long kInt8WinogradBandBytes = 2 * 1024 * 1024;

// Bytes of a panel's transformed filters that stay in L2: 256 channels. With 512 it loses to the direct sum.
inline constexpr long kInt8WinogradFilterBytes = 640 * 1024;

// What the transforms cost for each input and each output channel of a tile, and for each filter of a band, counted in
// multiply-adds of words; and the part of the direct sum's time that Winograd may take by this count.
inline constexpr long kInt8WinogradInputCost = 240;
inline constexpr long kInt8WinogradOutputCost = 570;
inline constexpr long kInt8WinogradFilterCost = 125;
inline constexpr double kInt8WinogradGain = 0.95;

}  // namespace lamina::tuning
