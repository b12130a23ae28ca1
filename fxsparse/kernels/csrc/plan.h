// What a product makes of a pattern before it begins, remembered for as long as the pattern lives: for a single image it
// takes as long as a good part of the product.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/StorageImpl.h>
#include <c10/util/intrusive_ptr.h>

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

namespace fxsparse {

// Where each entry of a pattern reads, counted from where its tile begins, in 16 bits if that is enough: the weights of a
// network do not stay in any cache from one image to the next. And where tiles end in each row: see `product`.
struct Plan {
  std::vector<uint16_t> narrow;
  std::vector<int32_t> wide;
  std::vector<int32_t> ends;

  Plan(int64_t count, bool is_narrow) : narrow(is_narrow ? count : 0), wide(is_narrow ? 0 : count) {}
};

// Which numbers a tensor holds, as far as can be told without reading them: changes in place are counted by its version,
// and `tensor.data = other` gives it another storage. The storage is held weakly: no other one has its address meanwhile.
class Contents {
 public:
  explicit Contents(const at::Tensor& tensor)
      : storage_(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(tensor.storage().unsafeGetStorageImpl())),
        data_(tensor.const_data_ptr()),
        size_(tensor.numel()),
        version_(tensor._version()) {}

  bool are_of(const at::Tensor& tensor) const {
    return storage_._unsafe_get_target() == tensor.storage().unsafeGetStorageImpl() && data_ == tensor.const_data_ptr() &&
           size_ == tensor.numel() && version_ == tensor._version();
  }

 private:
  c10::weak_intrusive_ptr<c10::StorageImpl> storage_;
  const void* data_;
  int64_t size_;
  int64_t version_;
};

// Plans by the tensors of a pattern's rows and columns, which are known to be the same by their contents.
class Plans {
 public:
  using Key = std::array<int64_t, 10>;  // all that a plan depends on beside the pattern

  static Plans& all() {
    static Plans plans;
    return plans;
  }

  std::shared_ptr<const Plan> find(const at::Tensor& starts, const at::Tensor& columns, const Key& key) {
    if (starts.is_inference() || columns.is_inference()) return nullptr;  // they have no version
    const std::lock_guard<std::mutex> guard(mutex_);
    const auto found = plans_.find(columns.unsafeGetTensorImpl());
    if (found == plans_.end() || !found->second.is_of(starts, columns)) return nullptr;
    for (const auto& [known, plan] : found->second.plans)
      if (known == key) return plan;
    return nullptr;
  }

  void put(const at::Tensor& starts, const at::Tensor& columns, const Key& key, std::shared_ptr<const Plan> plan) {
    if (starts.is_inference() || columns.is_inference()) return;
    const std::lock_guard<std::mutex> guard(mutex_);
    std::erase_if(plans_, [](const auto& item) { return item.second.columns.expired(); });
    Owner& owner = plans_.try_emplace(columns.unsafeGetTensorImpl(), starts, columns).first->second;
    if (!owner.is_of(starts, columns)) owner = Owner(starts, columns);
    constexpr size_t most = 2;  // geometries of one pattern
    if (owner.plans.size() == most) owner.plans.erase(owner.plans.begin());
    owner.plans.emplace_back(key, std::move(plan));
  }

 private:
  struct Owner {
    Owner(const at::Tensor& starts, const at::Tensor& columns_)
        : columns(columns_.getIntrusivePtr()), in_starts(starts), in_columns(columns_) {}
    bool is_of(const at::Tensor& starts, const at::Tensor& columns_) const {
      return !columns.expired() && in_starts.are_of(starts) && in_columns.are_of(columns_);
    }

    c10::weak_intrusive_ptr<c10::TensorImpl> columns;
    Contents in_starts, in_columns;
    std::vector<std::pair<Key, std::shared_ptr<const Plan>>> plans;
  };

  std::mutex mutex_;
  std::unordered_map<const c10::TensorImpl*, Owner> plans_;
};

}  // namespace fxsparse
